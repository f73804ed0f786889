// SPDX-License-Identifier: MIT
//
// What every backend must do, asked of its vtable directly over real pipes and sockets. A new
// backend joins by standing in vkp_test_backends_all(); docs/porting-a-backend.md explains the
// rules, and each test case here names one of them.
#include "support/catch.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "support/foreign/foreign.h"
#include "support/support.h"

namespace {

constexpr uint32_t both = VKP_IO_READ | VKP_IO_WRITE;
constexpr uint64_t ms = 1000000;

std::vector<const vkp_backend *> all_backends()
{
    std::vector<const vkp_backend *> found;
    for (const vkp_backend *const *at = vkp_test_backends_all(); *at != nullptr; at++) {
        found.push_back(*at);
    }
    return found;
}

// A guest's loop waits in its stead, and knows some things less well than we ask for.
bool is_guest()
{
    return vkp_test_foreign_loop() != nullptr;
}

bool dies_of_closed()
{
    return is_guest() && vkp_test_foreign_loop()->dies_of_closed;
}

bool spins_on_closed()
{
    return is_guest() && vkp_test_foreign_loop()->spins_on_closed;
}

#define ON_EVERY_BACKEND                                               \
    const vkp_backend *backend = GENERATE(from_range(all_backends())); \
    INFO("backend " << backend->name)

// ---- descriptors ----

class Fd {
  public:
    Fd() = default;
    explicit Fd(int fd) : fd_(fd)
    {
    }
    Fd(Fd &&other) noexcept : fd_(other.release())
    {
    }
    Fd &operator=(Fd &&other) noexcept
    {
        reset(other.release());
        return *this;
    }
    ~Fd()
    {
        reset();
    }
    operator int() const
    {
        return fd_;
    }
    int release()
    {
        return std::exchange(fd_, -1);
    }
    void reset(int fd = -1)
    {
        if (fd_ >= 0) {
            close(fd_);
        }
        fd_ = fd;
    }

  private:
    int fd_ = -1;
};

void put(int fd, const std::string &text = "x")
{
    if (write(fd, text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
        vkp_test_fail("a write to a test's descriptor failed: %s", strerror(errno));
    }
}

std::string take(int fd, size_t most = 4096)
{
    std::string text(most, '\0');
    ssize_t got = read(fd, &text[0], most);
    if (got < 0) {
        vkp_test_fail("a read from a test's descriptor failed: %s", strerror(errno));
    }
    text.resize(static_cast<size_t>(got));
    return text;
}

struct Pipe {
    Fd reader;
    Fd writer;
    Pipe()
    {
        int fds[2];
        if (pipe(fds) != 0) {
            vkp_test_fail("no pipe: %s", strerror(errno));
        }
        reader.reset(fds[0]);
        writer.reset(fds[1]);
    }
};

struct Socket {
    Fd mine;
    Fd peer;
    Socket()
    {
        int fds[2];
        vkp_test_socket_pair(fds);
        mine.reset(fds[0]);
        peer.reset(fds[1]);
    }
};

// ---- a table of system calls with faults in it ----

class Fault {
  public:
    Fault &operator=(int error) // a negated errno, or 0 for the real call
    {
        error_ = error;
        hits = 0;
        return *this;
    }
    template <typename Call>
    int or_else(Call call)
    {
        if (error_ == 0) {
            return call(); // without a trace: wakes come from other threads
        }
        hits++;
        return error_;
    }
    int hits = 0;

  private:
    int error_ = 0;
};

struct Faults {
    Fault wake_pair;
    Fault create; // of an epoll set or a kqueue
    Fault change; // of what such a one watches
    Fault wait;
    bool pipe_wake = false; // as where there is no eventfd
};
Faults faults;
const std::array<Fault Faults::*, 3> faults_of_opening = {&Faults::wake_pair, &Faults::create,
                                                          &Faults::change};

int pipe_wake_pair(int fds[2])
{
    if (pipe(fds) != 0) {
        return -errno;
    }
    for (int i = 0; i < 2; i++) {
        fcntl(fds[i], F_SETFL, O_NONBLOCK);
        fcntl(fds[i], F_SETFD, FD_CLOEXEC);
    }
    return 0;
}

const vkp_sys *faulty_sys()
{
    static const vkp_sys *const real = vkp_test_sys();
    static const vkp_sys table = [] {
        vkp_sys copy = *real;
        copy.wake_pair = [](int fds[2]) {
            return faults.wake_pair.or_else(
                [&] { return faults.pipe_wake ? pipe_wake_pair(fds) : real->wake_pair(fds); });
        };
        copy.epoll_create = [] {
            return faults.create.or_else([] { return real->epoll_create(); });
        };
        copy.epoll_ctl = [](int set, int operation, int fd, void *event) {
            return faults.change.or_else(
                [&] { return real->epoll_ctl(set, operation, fd, event); });
        };
        copy.poll = [](void *fds, size_t count, uint64_t deadline_ns) {
            return faults.wait.or_else([&] { return real->poll(fds, count, deadline_ns); });
        };
        copy.epoll_wait = [](int set, void *events, int capacity, uint64_t deadline_ns) {
            return faults.wait.or_else(
                [&] { return real->epoll_wait(set, events, capacity, deadline_ns); });
        };
        copy.kqueue_create = [] {
            return faults.create.or_else([] { return real->kqueue_create(); });
        };
        copy.kevent = [](int kq, const void *changes, int change_count, void *events,
                         int event_count, uint64_t deadline_ns) {
            return (change_count > 0 ? faults.change : faults.wait).or_else([&] {
                return real->kevent(kq, changes, change_count, events, event_count, deadline_ns);
            });
        };
        return copy;
    }();
    return &table;
}

// ---- a backend under test, in place of the loop ----

class Host {
  public:
    explicit Host(const vkp_backend *backend) : backend_(backend)
    {
        faults = Faults();
        fds_before_ = vkp_test_fd_count();
        vkp_test_env_init(&test);
        test.env.sys = faulty_sys();
        host_.env = &test.env;
    }
    ~Host()
    {
        close();
        vkp_test_env_deinit(&test);
    }
    Host(const Host &) = delete;
    Host &operator=(const Host &) = delete;

    vkp_status open()
    {
        return backend_->open(&host_, &state_);
    }
    void close()
    {
        if (state_ != nullptr) {
            backend_->close(std::exchange(state_, nullptr));
        }
    }
    bool is_open() const
    {
        return state_ != nullptr;
    }
    size_t blocks()
    {
        return vkp_test_env_live_blocks(&test);
    }
    int fds_more() const
    {
        return vkp_test_fd_count() - fds_before_;
    }

    vkp_test_env test;

  protected:
    const vkp_backend *backend_;
    vkp_backend_host host_ = {};
    void *state_ = nullptr;
    int fds_before_ = 0;
};

class Bench : public Host {
  public:
    explicit Bench(const vkp_backend *backend, bool pipe_wake = false) : Host(backend)
    {
        faults.pipe_wake = pipe_wake;
        if (open() != VKP_OK) {
            vkp_test_fail("backend %s does not open", backend->name);
        }
    }

    vkp_status watch(int fd, uint32_t interest, uint64_t token = 0)
    {
        return backend_->set_interest(state_, fd, interest, token);
    }
    void wake()
    {
        backend_->wake(state_);
    }
    vkp_status after_fork()
    {
        return backend_->after_fork(state_);
    }
    int pollable_fd()
    {
        return backend_->pollable_fd(state_);
    }
    bool is_virtual() const
    {
        return (backend_->flags & VKP_BACKEND_VIRTUAL_TIME) != 0;
    }
    uint64_t now()
    {
        return is_virtual() ? backend_->clock_ns(state_) : vkp_now_ns();
    }

    // For waits that something must end: a virtual clock would jump there instead.
    uint64_t patience()
    {
        return is_virtual() ? VKP_FOREVER : vkp_test_deadline();
    }

    vkp_status try_wait(uint64_t deadline_ns, std::vector<vkp_event> *events, size_t capacity = 64)
    {
        constexpr uint32_t untouched = 0xa5a5a5a5u;
        std::vector<vkp_event> out(capacity + 1, vkp_event{0, untouched});
        size_t count = SIZE_MAX;
        vkp_status status = backend_->wait(state_, deadline_ns, out.data(), capacity, &count);
        events->clear();
        if (status != VKP_OK) {
            if (count != SIZE_MAX) {
                vkp_test_fail("a failed wait wrote its out-parameter");
            }
            return status;
        }
        if (count > capacity || out[capacity].ready != untouched) {
            vkp_test_fail("more events than there was room for");
        }
        events->assign(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(count));
        for (const vkp_event &event : *events) {
            if (event.ready == 0 || (event.ready & ~(both | VKP_IO_HUP | VKP_IO_ERROR)) != 0) {
                vkp_test_fail("an event without readiness, or with unknown bits");
            }
            if ((event.ready & (VKP_IO_HUP | VKP_IO_ERROR)) != 0 && (event.ready & both) != both) {
                vkp_test_fail("HUP or ERR without both directions");
            }
        }
        return status;
    }

    std::vector<vkp_event> wait(uint64_t deadline_ns, size_t capacity = 64)
    {
        std::vector<vkp_event> events;
        if (try_wait(deadline_ns, &events, capacity) != VKP_OK) {
            vkp_test_fail("a wait failed: %s", strerror(errno));
        }
        return events;
    }

    // Whether a wake, not its deadline, ended a wait without events.
    bool woken(size_t capacity = 64)
    {
        const uint64_t deadline = patience();
        return wait(deadline, capacity).empty() && now() < deadline;
    }

    // What is ready now. A round that only looks may meet what an earlier one left behind.
    std::map<uint64_t, uint32_t> ready(size_t capacity = 64)
    {
        std::map<uint64_t, uint32_t> found;
        for (const vkp_event &event : wait(0, capacity)) {
            if (!found.emplace(event.token, event.ready).second) {
                vkp_test_fail("two events for one token in a batch");
            }
        }
        return found;
    }

    // Waits that end without an event before their deadline: wakes, or worse.
    int early_returns(int most)
    {
        int early = 0;
        for (;;) {
            const uint64_t deadline = now() + 5 * ms;
            if (!wait(deadline).empty()) {
                vkp_test_fail("an event where nothing is ready");
            }
            if (now() >= deadline || early == most) {
                return early;
            }
            early++;
        }
    }
};

using Ready = std::map<uint64_t, uint32_t>;

} // namespace

// ---- the struct ----

TEST_CASE("backend: the struct is complete")
{
    ON_EVERY_BACKEND;
    CHECK(backend->abi == VKP_BACKEND_ABI);
    CHECK(std::string(backend->name).size() > 0);
    CHECK(backend->open != nullptr);
    CHECK(backend->close != nullptr);
    CHECK(backend->set_interest != nullptr);
    CHECK(backend->wait != nullptr);
    CHECK(backend->wake != nullptr);
    CHECK(backend->after_fork != nullptr);
    CHECK(backend->pollable_fd != nullptr);
    CHECK(((backend->flags & VKP_BACKEND_GUEST) != 0) == (backend->timer != nullptr));
    CHECK(((backend->flags & VKP_BACKEND_VIRTUAL_TIME) != 0) == (backend->clock_ns != nullptr));
}

TEST_CASE("backend: open and close leave nothing behind, watched descriptors stay open")
{
    ON_EVERY_BACKEND;
    Pipe pipe;
    Host host(backend);
    REQUIRE(host.open() == VKP_OK);
    host.close();
    CHECK(host.blocks() == 0);
    CHECK(host.fds_more() == 0);
    {
        Bench bench(backend);
        REQUIRE(bench.watch(pipe.reader, VKP_IO_READ, 1) == VKP_OK);
        REQUIRE(bench.watch(pipe.writer, VKP_IO_WRITE, 2) == VKP_OK);
        bench.close();
        CHECK(bench.blocks() == 0);
        CHECK(bench.fds_more() == 0);
    }
    put(pipe.writer);
    CHECK(take(pipe.reader) == "x");
}

// ---- interest ----

TEST_CASE("backend: interest is set, replaced and removed")
{
    ON_EVERY_BACKEND;
    Socket socket;
    Bench bench(backend);
    REQUIRE(bench.watch(socket.mine, VKP_IO_READ, 7) == VKP_OK);
    CHECK(bench.ready() == Ready{});
    REQUIRE(bench.watch(socket.mine, VKP_IO_WRITE, 7) == VKP_OK);
    CHECK(bench.ready() == Ready{{7, VKP_IO_WRITE}});
    put(socket.peer);
    CHECK(bench.ready() == Ready{{7, VKP_IO_WRITE}});
    REQUIRE(bench.watch(socket.mine, both, 7) == VKP_OK);
    CHECK(bench.ready() == Ready{{7, both}});
    REQUIRE(bench.watch(socket.mine, VKP_IO_READ, 7) == VKP_OK);
    CHECK(bench.ready() == Ready{{7, VKP_IO_READ}});
    REQUIRE(bench.watch(socket.mine, 0, 7) == VKP_OK);
    CHECK(bench.ready() == Ready{});
    REQUIRE(bench.watch(socket.mine, VKP_IO_READ, 7) == VKP_OK);
    CHECK(bench.ready() == Ready{{7, VKP_IO_READ}});
}

TEST_CASE("backend: watch is idempotent")
{
    ON_EVERY_BACKEND;
    Pipe pipe;
    Bench bench(backend);
    CHECK(bench.watch(pipe.reader, 0) == VKP_OK);
    CHECK(bench.watch(9999, 0) == VKP_OK);
    put(pipe.writer);
    for (int i = 0; i < 3; i++) {
        REQUIRE(bench.watch(pipe.reader, VKP_IO_READ, 5) == VKP_OK);
        CHECK(bench.ready() == Ready{{5, VKP_IO_READ}});
    }
    for (int i = 0; i < 3; i++) {
        REQUIRE(bench.watch(pipe.reader, 0, 5) == VKP_OK);
        CHECK(bench.ready() == Ready{});
    }
}

TEST_CASE("backend: a negative descriptor is refused")
{
    ON_EVERY_BACKEND;
    Bench bench(backend);
    CHECK(bench.watch(-1, VKP_IO_READ, 1) == VKP_ERR_INVALID);
    CHECK(bench.watch(-1, 0, 1) == VKP_ERR_INVALID);
    CHECK(bench.ready() == Ready{});
}

TEST_CASE("backend: the token is opaque and comes back as last given")
{
    ON_EVERY_BACKEND;
    const std::array<uint64_t, 6> tokens = {
        0, 1, UINT64_MAX, uint64_t(1) << 63, 0xffffffff00000000u, 0x00000000ffffffffu};
    std::vector<Pipe> pipes(tokens.size());
    Bench bench(backend);
    std::set<uint64_t> expected;
    for (size_t i = 0; i < tokens.size(); i++) {
        REQUIRE(bench.watch(pipes[i].reader, VKP_IO_READ, 4242) == VKP_OK);
        REQUIRE(bench.watch(pipes[i].reader, VKP_IO_READ, tokens[i]) == VKP_OK);
        put(pipes[i].writer);
        expected.insert(tokens[i]);
    }
    std::set<uint64_t> seen;
    for (const auto &event : bench.ready()) {
        CHECK(event.second == VKP_IO_READ);
        seen.insert(event.first);
    }
    CHECK(seen == expected);
}

TEST_CASE("backend: of several descriptors exactly the ready ones are reported, each once")
{
    ON_EVERY_BACKEND;
    std::vector<Pipe> pipes(16);
    Bench bench(backend);
    for (size_t i = 0; i < pipes.size(); i++) {
        REQUIRE(bench.watch(pipes[i].reader, VKP_IO_READ, i) == VKP_OK);
    }
    // Every removal leaves a hole that something else fills.
    for (size_t i = 0; i < pipes.size(); i += 3) {
        REQUIRE(bench.watch(pipes[i].reader, 0) == VKP_OK);
    }
    Ready expected;
    for (size_t i = 0; i < pipes.size(); i++) {
        if (i % 2 == 0) {
            put(pipes[i].writer);
            if (i % 3 != 0) {
                expected[i] = VKP_IO_READ;
            }
        }
    }
    CHECK(bench.ready() == expected);
    for (size_t i = 0; i < pipes.size(); i += 3) {
        REQUIRE(bench.watch(pipes[i].reader, VKP_IO_READ, 100 + i) == VKP_OK);
        if (i % 2 == 0) {
            expected[100 + i] = VKP_IO_READ;
        }
    }
    CHECK(bench.ready() == expected);
}

TEST_CASE("backend: what can be read and written is one event")
{
    ON_EVERY_BACKEND;
    std::vector<Socket> sockets(8);
    Bench bench(backend);
    Ready expected;
    for (size_t i = 0; i < sockets.size(); i++) {
        REQUIRE(bench.watch(sockets[i].mine, both, i) == VKP_OK);
        put(sockets[i].peer);
        expected[i] = both;
    }
    for (int i = 0; i < 3; i++) {
        CHECK(bench.ready() == expected);
    }
    // Cut off between the two directions, the rest comes later.
    for (const size_t capacity : {1u, 3u, 5u}) {
        Ready seen;
        for (int i = 0; i < 32; i++) {
            for (const auto &event : bench.ready(capacity)) {
                seen[event.first] |= event.second;
            }
        }
        CHECK(seen == expected);
    }
}

TEST_CASE("backend: a thousand descriptors, and ten thousand")
{
    ON_EVERY_BACKEND;
    const size_t count = GENERATE(1100u, 10000u);
    INFO(count << " descriptors");
    rlimit limit;
    REQUIRE(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    const rlimit before = limit;
    if (limit.rlim_cur < count + 200) {
        limit.rlim_cur = std::min<rlim_t>(limit.rlim_max, count + 200);
        REQUIRE(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    }
    if (limit.rlim_cur < count + 200) {
        WARN("this system allows " << limit.rlim_cur << " descriptors, not " << count + 200);
        return;
    }
    Pipe pipe; // many descriptors of two pipes: half as many are needed as for pipes of their own
    Pipe quiet;
    std::vector<Fd> fds;
    Bench bench(backend);
    Ready expected;
    for (size_t i = 0; i < count; i++) {
        const bool busy = i % (count / 110) == 0; // one batch takes them all
        fds.emplace_back(dup(busy ? pipe.reader : quiet.reader));
        REQUIRE(int(fds.back()) >= 0);
        REQUIRE(bench.watch(fds.back(), VKP_IO_READ, i) == VKP_OK);
        if (busy) {
            expected[i] = VKP_IO_READ;
        }
    }
    CHECK(bench.ready(count) == Ready{});
    put(pipe.writer);
    Ready seen;
    for (int i = 0; i < 3; i++) { // libev's first batch has room for 64
        for (const auto &event : bench.ready(count)) {
            seen.insert(event);
        }
    }
    CHECK(seen == expected);
    for (size_t i = 0; i < count; i++) {
        REQUIRE(bench.watch(fds[i], 0) == VKP_OK);
    }
    CHECK(bench.ready(count) == Ready{});
    fds.clear();
    REQUIRE(setrlimit(RLIMIT_NOFILE, &before) == 0);
}

TEST_CASE("backend: a regular file is ready at once or refused with the system's error")
{
    ON_EVERY_BACKEND;
    Fd file(open(vkp_test_path("regular"), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    REQUIRE(int(file) >= 0);
    Bench bench(backend);
    errno = 0;
    vkp_status status = bench.watch(file, VKP_IO_READ, 3);
    if (status == VKP_OK) {
        CHECK(bench.ready() == Ready{{3, VKP_IO_READ}});
    } else {
        CHECK(status == VKP_ERR_SYS);
        CHECK(errno == EPERM);
        CHECK(bench.ready() == Ready{});
    }
    CHECK(bench.watch(file, 0) == VKP_OK);
    CHECK(bench.ready() == Ready{});
}

// ---- level-triggered ----

TEST_CASE("backend: readiness is repeated until it ends")
{
    ON_EVERY_BACKEND;
    Pipe pipe;
    Bench bench(backend);
    REQUIRE(bench.watch(pipe.reader, VKP_IO_READ, 1) == VKP_OK);
    put(pipe.writer, "abc");
    for (int i = 0; i < 3; i++) {
        CHECK(bench.ready() == Ready{{1, VKP_IO_READ}});
        CHECK(take(pipe.reader, 1).size() == 1);
    }
    CHECK(bench.ready() == Ready{});
}

TEST_CASE("backend: a full socket becomes writable when its peer reads")
{
    ON_EVERY_BACKEND;
    Socket socket;
    Bench bench(backend);
    REQUIRE(bench.watch(socket.mine, VKP_IO_WRITE, 1) == VKP_OK);
    const std::string chunk(4096, 'x');
    size_t sent = 0;
    for (;;) {
        ssize_t put_now = write(socket.mine, chunk.data(), chunk.size());
        if (put_now < 0) {
            REQUIRE((errno == EAGAIN || errno == EWOULDBLOCK));
            break;
        }
        sent += static_cast<size_t>(put_now);
    }
    CHECK(bench.ready() == Ready{});
    while (sent > 0) {
        sent -= take(socket.peer, std::min<size_t>(sent, 4096)).size();
    }
    CHECK(bench.ready() == Ready{{1, VKP_IO_WRITE}});
}

TEST_CASE("backend: events beyond the capacity come with the next wait")
{
    ON_EVERY_BACKEND;
    std::vector<Pipe> pipes(10);
    Bench bench(backend);
    for (size_t i = 0; i < pipes.size(); i++) {
        REQUIRE(bench.watch(pipes[i].reader, VKP_IO_READ, i) == VKP_OK);
        put(pipes[i].writer);
    }
    SECTION("those delivered are drained")
    {
        std::set<uint64_t> seen;
        for (const size_t expected : {3u, 3u, 3u, 1u}) {
            const Ready batch = bench.ready(3);
            CHECK(batch.size() == expected);
            for (const auto &event : batch) {
                CHECK(seen.insert(event.first).second);
                take(pipes[event.first].reader);
            }
        }
        CHECK(seen.size() == pipes.size());
        CHECK(bench.ready(3) == Ready{});
    }
    SECTION("those delivered stay ready, and starve nobody")
    {
        for (int round = 0; round < 5; round++) {
            std::set<uint64_t> seen;
            for (int i = 0; i < 4; i++) {
                for (const auto &event : bench.ready(3)) {
                    seen.insert(event.first);
                }
            }
            CHECK(seen.size() == pipes.size());
        }
    }
    SECTION("what was cut off is over: the others are reported")
    {
        Ready batch = bench.ready(8);
        CHECK(batch.size() == 8);
        for (size_t i = 0; i < pipes.size(); i++) {
            if (batch.count(i) == 0) {
                take(pipes[i].reader);
            }
        }
        CHECK(bench.ready(8) == batch);
    }
    SECTION("one at a time, while another comes and goes")
    {
        std::set<uint64_t> seen;
        for (int i = 0; i < 40; i++) {
            REQUIRE(bench.watch(pipes[0].reader, 0) == VKP_OK);
            REQUIRE(bench.watch(pipes[0].reader, VKP_IO_READ, 0) == VKP_OK);
            for (const auto &event : bench.ready(1)) {
                seen.insert(event.first);
            }
        }
        seen.erase(0);
        CHECK(seen.size() == pipes.size() - 1);
    }
}

// ---- hang-ups and errors ----

TEST_CASE("backend: a hang-up with data left is readable, and stays so until removed")
{
    ON_EVERY_BACKEND;
    Bench bench(backend);
    SECTION("pipe")
    {
        Pipe pipe;
        REQUIRE(bench.watch(pipe.reader, VKP_IO_READ, 1) == VKP_OK);
        put(pipe.writer, "last words");
        pipe.writer.reset();
        Ready first = bench.ready();
        REQUIRE(first.count(1) == 1);
        CHECK((first[1] & VKP_IO_READ) != 0);
        CHECK(take(pipe.reader) == "last words");
        for (int i = 0; i < 3; i++) {
            Ready later = bench.ready();
            REQUIRE(later.count(1) == 1);
            CHECK((later[1] & VKP_IO_READ) != 0);
            CHECK((later[1] & VKP_IO_HUP) != 0);
            CHECK(take(pipe.reader).empty());
        }
        REQUIRE(bench.watch(pipe.reader, 0) == VKP_OK);
        CHECK(bench.ready() == Ready{});
    }
    SECTION("socket")
    {
        Socket socket;
        REQUIRE(bench.watch(socket.mine, VKP_IO_READ, 1) == VKP_OK);
        put(socket.peer, "last words");
        socket.peer.reset();
        Ready first = bench.ready();
        REQUIRE(first.count(1) == 1);
        CHECK((first[1] & VKP_IO_READ) != 0);
        CHECK(take(socket.mine) == "last words");
        Ready later = bench.ready();
        REQUIRE(later.count(1) == 1);
        CHECK((later[1] & VKP_IO_READ) != 0);
        CHECK(take(socket.mine).empty());
        REQUIRE(bench.watch(socket.mine, 0) == VKP_OK);
        CHECK(bench.ready() == Ready{});
    }
    SECTION("half closed: readable, and still writable")
    {
        Socket socket;
        REQUIRE(bench.watch(socket.mine, both, 1) == VKP_OK);
        REQUIRE(shutdown(socket.peer, SHUT_WR) == 0);
        Ready events = bench.ready();
        REQUIRE(events.count(1) == 1);
        CHECK((events[1] & both) == both);
        CHECK(take(socket.mine).empty());
        put(socket.mine, "answer");
        CHECK(take(socket.peer) == "answer");
    }
}

TEST_CASE("backend: a pipe that nobody will read tells its writer")
{
    ON_EVERY_BACKEND;
    Pipe pipe;
    Bench bench(backend);
    REQUIRE(bench.watch(pipe.writer, VKP_IO_WRITE, 1) == VKP_OK);
    CHECK(bench.ready() == Ready{{1, VKP_IO_WRITE}});
    pipe.reader.reset();
    Ready events = bench.ready();
    REQUIRE(events.count(1) == 1);
    CHECK((events[1] & VKP_IO_WRITE) != 0);
    CHECK((events[1] & (VKP_IO_ERROR | VKP_IO_HUP)) != 0);
}

TEST_CASE("backend: a pipe that nobody reads any more is refused, or tells its writer")
{
    ON_EVERY_BACKEND;
    Pipe pipe;
    Bench bench(backend);
    pipe.reader.reset();
    errno = 0;
    if (bench.watch(pipe.writer, VKP_IO_WRITE, 1) == VKP_OK) {
        Ready events = bench.ready();
        REQUIRE(events.count(1) == 1);
        CHECK((events[1] & (VKP_IO_ERROR | VKP_IO_HUP)) != 0);
    } else {
        CHECK(errno == EPIPE);
        CHECK(bench.ready() == Ready{});
    }
    CHECK(bench.watch(pipe.writer, 0) == VKP_OK);
    CHECK(bench.ready() == Ready{});
}

TEST_CASE("backend: a half-open socket lets the loop sleep")
{
    ON_EVERY_BACKEND;
    Socket socket;
    Bench bench(backend);
    const std::string chunk(4096, 'x');
    SECTION("the peer sends no more, and that was read")
    {
        REQUIRE(bench.watch(socket.mine, VKP_IO_READ, 1) == VKP_OK);
        REQUIRE(shutdown(socket.peer, SHUT_WR) == 0);
        CHECK((bench.ready()[1] & VKP_IO_READ) != 0);
        CHECK(take(socket.mine).empty());
        REQUIRE(bench.watch(socket.mine, 0, 1) == VKP_OK);
        CHECK(bench.early_returns(100) <= 1);
        put(socket.mine, "answer");
        CHECK(take(socket.peer) == "answer");
        CHECK(bench.early_returns(100) <= 1);
    }
    SECTION("the peer sends no more, and does not read")
    {
        while (write(socket.mine, chunk.data(), chunk.size()) > 0) {
        }
        REQUIRE(shutdown(socket.peer, SHUT_WR) == 0);
        REQUIRE(bench.watch(socket.mine, VKP_IO_WRITE, 1) == VKP_OK);
        CHECK(bench.early_returns(100) <= 1);
        while (bench.ready().empty()) {
            take(socket.peer);
        }
        CHECK(bench.ready() == Ready{{1, VKP_IO_WRITE}});
        CHECK(write(socket.mine, chunk.data(), 1) == 1);
    }
    SECTION("we send no more, and wait for the answer")
    {
        REQUIRE(shutdown(socket.mine, SHUT_WR) == 0);
        REQUIRE(bench.watch(socket.mine, VKP_IO_READ, 1) == VKP_OK);
        CHECK(bench.early_returns(100) <= 1);
        put(socket.peer, "answer");
        CHECK((bench.ready()[1] & VKP_IO_READ) != 0);
        CHECK(take(socket.mine) == "answer");
        CHECK(bench.early_returns(100) <= 1);
    }
    SECTION("both ends are closed, and the watch is over")
    {
        REQUIRE(bench.watch(socket.mine, both, 1) == VKP_OK);
        socket.peer.reset();
        CHECK((bench.ready()[1] & both) == both);
        REQUIRE(bench.watch(socket.mine, 0, 1) == VKP_OK);
        CHECK(bench.early_returns(100) <= 1);
    }
}

// ---- descriptors that are closed and used again ----

TEST_CASE("backend: descriptors are closed while their batch is handled")
{
    ON_EVERY_BACKEND;
    std::vector<Pipe> pipes(12);
    std::vector<Pipe> fresh;
    Bench bench(backend);
    Ready expected;
    for (size_t i = 0; i < pipes.size(); i++) {
        REQUIRE(bench.watch(pipes[i].reader, VKP_IO_READ, i) == VKP_OK);
        put(pipes[i].writer);
    }
    CHECK(bench.ready().size() == pipes.size());
    for (size_t i = 0; i < pipes.size(); i++) {
        if (i % 3 == 0) { // its own, and the next one's, whose event is still to be handled
            for (const size_t ended : {i, i + 1}) {
                REQUIRE(bench.watch(pipes[ended].reader, 0) == VKP_OK);
                pipes[ended] = Pipe(); // another file, of the same number more often than not
            }
            REQUIRE(bench.watch(pipes[i].reader, VKP_IO_READ, 100 + i) == VKP_OK);
        } else if (i % 3 == 2) {
            expected[i] = VKP_IO_READ;
        }
    }
    CHECK(bench.ready() == expected);
    for (size_t i = 0; i < pipes.size(); i += 3) {
        put(pipes[i].writer);
        put(pipes[i + 1].writer);
        expected[100 + i] = VKP_IO_READ;
    }
    CHECK(bench.ready() == expected);
}

TEST_CASE("backend: a number used again inside a batch brings no event of its former owner")
{
    ON_EVERY_BACKEND;
    Pipe first;
    Pipe second;
    Bench bench(backend);
    REQUIRE(bench.watch(first.reader, VKP_IO_READ, 1) == VKP_OK);
    REQUIRE(bench.watch(second.reader, VKP_IO_READ, 2) == VKP_OK);
    put(first.writer);
    put(second.writer);
    CHECK(bench.ready() == Ready{{1, VKP_IO_READ}, {2, VKP_IO_READ}});
    // The callback of 1 ends 2 and opens something else, which gets the number.
    const int number = second.reader;
    REQUIRE(bench.watch(number, 0) == VKP_OK);
    second.reader.reset();
    Pipe third;
    if (int(third.reader) != number) {
        REQUIRE(dup2(third.reader, number) == number);
        third.reader.reset(number);
    }
    REQUIRE(bench.watch(number, VKP_IO_READ, 3) == VKP_OK);
    CHECK(bench.ready() == Ready{{1, VKP_IO_READ}});
    put(third.writer);
    CHECK(bench.ready() == Ready{{1, VKP_IO_READ}, {3, VKP_IO_READ}});
}

TEST_CASE("backend: a descriptor closed without a word")
{
    ON_EVERY_BACKEND;
    Pipe old;
    Pipe fresh;
    Bench bench(backend);
    const int number = old.reader;
    REQUIRE(bench.watch(number, VKP_IO_READ, 1) == VKP_OK);
    put(old.writer);
    CHECK(bench.ready() == Ready{{1, VKP_IO_READ}});
    SECTION("is removed")
    {
        old.reader.reset();
        CHECK(bench.watch(number, 0) == VKP_OK);
        CHECK(bench.ready() == Ready{});
    }
    SECTION("is watched anew as another file")
    {
        REQUIRE(dup2(fresh.reader, number) == number); // closes what was there
        REQUIRE(bench.watch(number, VKP_IO_READ, 2) == VKP_OK);
        CHECK(bench.ready() == Ready{});
        put(fresh.writer);
        CHECK(bench.ready() == Ready{{2, VKP_IO_READ}});
    }
    SECTION("is removed, then watched anew as another file")
    {
        old.reader.reset();
        CHECK(bench.watch(number, 0) == VKP_OK);
        old.reader.reset(dup2(fresh.reader, number));
        REQUIRE(bench.watch(number, VKP_IO_READ, 2) == VKP_OK);
        CHECK(bench.ready() == Ready{});
        put(fresh.writer);
        CHECK(bench.ready() == Ready{{2, VKP_IO_READ}});
    }
}

TEST_CASE("backend: a descriptor closed without a word while a duplicate lives")
{
    ON_EVERY_BACKEND;
    Pipe old;
    Pipe fresh;
    Bench bench(backend);
    const int number = old.reader;
    Fd duplicate(dup(old.reader));
    REQUIRE(int(duplicate) >= 0);
    REQUIRE(bench.watch(number, VKP_IO_READ, 1) == VKP_OK);
    put(old.writer);
    CHECK(bench.ready() == Ready{{1, VKP_IO_READ}});
    SECTION("says nothing any more, nor keeps waits from waiting")
    {
        old.reader.reset();
        CHECK(bench.watch(number, 0) == VKP_OK);
        CHECK(bench.ready() == Ready{});
        CHECK(bench.early_returns(10) <= 2);
    }
    SECTION("and the number stands for another file")
    {
        REQUIRE(dup2(fresh.reader, number) == number); // closes what was there
        REQUIRE(bench.watch(number, VKP_IO_READ, 2) == VKP_OK);
        CHECK(bench.ready() == Ready{});
        CHECK(bench.early_returns(10) <= (spins_on_closed() ? 10 : 2));
        put(fresh.writer);
        CHECK(bench.ready() == Ready{{2, VKP_IO_READ}});
    }
    SECTION("and the number stands for the same file again")
    {
        old.reader.reset();
        CHECK(bench.watch(number, 0) == VKP_OK);
        old.reader.reset(dup2(duplicate, number));
        REQUIRE(bench.watch(number, VKP_IO_READ, 2) == VKP_OK);
        CHECK(bench.ready() == Ready{{2, VKP_IO_READ}});
        REQUIRE(bench.watch(number, 0) == VKP_OK);
        CHECK(bench.early_returns(10) <= 2);
    }
    SECTION("and the others are still watched afterwards")
    {
        REQUIRE(bench.watch(fresh.reader, VKP_IO_READ, 3) == VKP_OK);
        old.reader.reset();
        CHECK(bench.watch(number, 0) == VKP_OK);
        CHECK(bench.ready() == Ready{});
        CHECK(bench.early_returns(10) <= 2);
        bench.wake();
        CHECK(bench.woken());
        put(fresh.writer);
        CHECK(bench.ready() == Ready{{3, VKP_IO_READ}});
    }
    SECTION("and others were closed without a word as well")
    {
        if (dies_of_closed()) {
            return;
        }
        std::vector<int> closed;
        {
            std::vector<Pipe> more(5);
            for (const Pipe &pipe : more) {
                closed.push_back(pipe.reader);
                REQUIRE(bench.watch(pipe.reader, VKP_IO_READ, 100) == VKP_OK);
            }
        }
        old.reader.reset();
        CHECK(bench.watch(number, 0) == VKP_OK);
        // What a closed descriptor says until it is removed is the kernel's business.
        CHECK(bench.wait(0).size() <= closed.size());
        for (int fd : closed) {
            CHECK(bench.watch(fd, 0) == VKP_OK);
        }
        CHECK(bench.early_returns(10) == 0);
    }
    SECTION("and no descriptor is lost over it")
    {
        old.reader.reset();
        const int before = vkp_test_fd_count();
        CHECK(bench.watch(number, 0) == VKP_OK);
        CHECK(bench.ready() == Ready{});
        CHECK(bench.early_returns(10) <= 2);
        CHECK(vkp_test_fd_count() == before);
    }
    SECTION("and a new set cannot be had: nothing wrong is reported meanwhile")
    {
        old.reader.reset();
        CHECK(bench.watch(number, 0) == VKP_OK);
        faults.create = -EMFILE;
        for (int i = 0; i < 5; i++) {
            CHECK(bench.ready() == Ready{});
        }
        faults.create = 0;
        CHECK(bench.ready() == Ready{});
        CHECK(bench.early_returns(10) <= 2);
    }
}

// ---- deadlines ----

TEST_CASE("backend: a deadline that has passed does not wait")
{
    ON_EVERY_BACKEND;
    Pipe pipe;
    Bench bench(backend);
    REQUIRE(bench.watch(pipe.reader, VKP_IO_READ, 1) == VKP_OK);
    const uint64_t before = bench.now();
    CHECK(before > 0);
    CHECK(bench.wait(0).empty());
    CHECK(bench.wait(1).empty());
    CHECK(bench.wait(before).empty());
    CHECK(bench.now() >= before);
    put(pipe.writer);
    CHECK(bench.wait(0).size() == 1);
    CHECK(bench.wait(1).size() == 1);
}

TEST_CASE("backend: a wait without events ends at its deadline, never before")
{
    ON_EVERY_BACKEND;
    Bench bench(backend);
    for (const uint64_t ahead : {uint64_t(1), uint64_t(999), ms / 3, ms - 1, ms, ms + 1, 3 * ms / 2,
                                 7 * ms, 20 * ms + 1}) {
        const uint64_t deadline = bench.now() + ahead;
        CHECK(bench.wait(deadline).empty());
        CHECK(bench.now() >= deadline);
    }
}

TEST_CASE("backend: an event ends a wait before its deadline")
{
    ON_EVERY_BACKEND;
    Pipe pipe;
    Bench bench(backend);
    REQUIRE(bench.watch(pipe.reader, VKP_IO_READ, 1) == VKP_OK);
    std::thread other([&] { put(pipe.writer); });
    std::vector<vkp_event> events = bench.wait(VKP_FOREVER);
    other.join();
    REQUIRE(events.size() == 1);
    CHECK(events[0].token == 1);
    CHECK(events[0].ready == VKP_IO_READ);
}

TEST_CASE("backend: a signal is no event and no error")
{
    ON_EVERY_BACKEND;
    Bench bench(backend);
    SECTION("the system call says so")
    {
        faults.wait = -EINTR;
        std::vector<vkp_event> events(1);
        const uint64_t last = is_guest() ? bench.now() + 2 * ms : VKP_FOREVER;
        for (const uint64_t deadline : {uint64_t(0), bench.now() + ms, last}) {
            CHECK(bench.try_wait(deadline, &events) == VKP_OK);
            CHECK(events.empty());
        }
    }
    SECTION("a storm of them")
    {
        struct sigaction action = {};
        struct sigaction before = {};
        action.sa_handler = [](int) {};
        REQUIRE(sigaction(SIGALRM, &action, &before) == 0);
        itimerval every = {};
        every.it_interval.tv_usec = 500;
        every.it_value.tv_usec = 500;
        REQUIRE(setitimer(ITIMER_REAL, &every, nullptr) == 0);
        bool quiet = true;
        for (int i = 0; i < 50; i++) {
            // Nothing but a signal can end it. A guest's loop goes on: not before its deadline.
            const uint64_t deadline = is_guest() ? bench.now() + ms : VKP_FOREVER;
            const bool none = bench.wait(deadline).empty();
            quiet = none && (!is_guest() || bench.now() >= deadline) && quiet;
        }
        every = itimerval();
        REQUIRE(setitimer(ITIMER_REAL, &every, nullptr) == 0);
        REQUIRE(sigaction(SIGALRM, &before, nullptr) == 0);
        CHECK(quiet);
    }
}

TEST_CASE("backend: a storm of signals loses no event and no wake")
{
    ON_EVERY_BACKEND;
    static std::atomic<int> signals;
    constexpr int rounds = 1000;
    Socket socket;
    Bench bench(backend);
    REQUIRE(bench.watch(socket.mine, VKP_IO_READ, 1) == VKP_OK);
    std::atomic<int> wakes{0};
    int echoed = 0;
    int answered = 0;
    signals = 0;
    // Each round of the other thread needs an event here, and each second one a wake as well.
    std::thread other([&] {
        sigset_t blocked; // the storm is for the thread that waits
        sigemptyset(&blocked);
        sigaddset(&blocked, SIGALRM);
        pthread_sigmask(SIG_BLOCK, &blocked, nullptr);
        for (int i = 0; i < rounds; i++) {
            put(socket.peer);
            take(socket.peer, 1);
            if (i % 2 == 0) {
                wakes.fetch_add(1);
                bench.wake();
                take(socket.peer, 1);
            }
        }
    });
    struct sigaction action = {};
    struct sigaction before = {};
    action.sa_handler = [](int) { signals.fetch_add(1); };
    REQUIRE(sigaction(SIGALRM, &action, &before) == 0);
    itimerval every = {};
    every.it_interval.tv_usec = 100;
    every.it_value.tv_usec = 100;
    REQUIRE(setitimer(ITIMER_REAL, &every, nullptr) == 0);
    while (echoed < rounds || answered < rounds / 2) {
        const uint64_t deadline = bench.patience();
        for (const vkp_event &event : bench.wait(deadline)) {
            if (event.ready != VKP_IO_READ) {
                vkp_test_fail("backend %s: not readable alone", backend->name);
            }
            take(socket.mine, 1);
            put(socket.mine);
            echoed++;
        }
        if (bench.now() >= deadline) {
            vkp_test_fail("backend %s lost an event or a wake", backend->name);
        }
        for (; answered < wakes.load(); answered++) {
            put(socket.mine);
        }
    }
    every = itimerval();
    REQUIRE(setitimer(ITIMER_REAL, &every, nullptr) == 0);
    REQUIRE(sigaction(SIGALRM, &before, nullptr) == 0);
    other.join();
    CHECK(echoed == rounds);
    CHECK(answered == rounds / 2);
    CHECK(signals > 0);
    CHECK(bench.early_returns(100) <= 2);
}

// ---- wake ----

TEST_CASE("backend: a wake before a wait ends it at once, and only it")
{
    ON_EVERY_BACKEND;
    const bool pipe_wake = GENERATE(false, true);
    INFO((pipe_wake ? "wake over a pipe" : "the platform's wake"));
    Pipe pipe;
    Bench bench(backend, pipe_wake);
    REQUIRE(bench.watch(pipe.reader, VKP_IO_READ, 1) == VKP_OK);
    for (int i = 0; i < 3; i++) {
        bench.wake();
        const uint64_t before = bench.now();
        CHECK(bench.woken());
        if (bench.is_virtual()) {
            CHECK(bench.now() == before);
        }
        CHECK(bench.early_returns(10) == 0);
    }
    bench.wake();
    put(pipe.writer);
    std::set<uint64_t> tokens;
    for (const vkp_event &event : bench.wait(bench.patience())) {
        tokens.insert(event.token);
    }
    CHECK(tokens == std::set<uint64_t>{1});
    take(pipe.reader);
    CHECK(bench.early_returns(10) == 0);
}

TEST_CASE("backend: a wake reaches a wait that has room for one event only")
{
    ON_EVERY_BACKEND;
    Pipe pipe;
    Bench bench(backend);
    REQUIRE(bench.watch(pipe.reader, VKP_IO_READ, 1) == VKP_OK);
    put(pipe.writer);
    bench.wake();
    size_t events = 0;
    for (int i = 0; i < 2; i++) {
        events += bench.wait(bench.patience(), 1).size();
    }
    CHECK(events >= 1);
    take(pipe.reader);
    CHECK(bench.early_returns(10) <= 1);
}

TEST_CASE("backend: a hundred thousand wakes end a few waits")
{
    ON_EVERY_BACKEND;
    const bool pipe_wake = GENERATE(false, true);
    INFO((pipe_wake ? "wake over a pipe" : "the platform's wake"));
    Bench bench(backend, pipe_wake);
    for (int i = 0; i < 100000; i++) {
        bench.wake();
    }
    CHECK(bench.woken());
    CHECK(bench.early_returns(100) <= 2);
    bench.wake();
    CHECK(bench.woken());
}

TEST_CASE("backend: no wake from another thread is lost")
{
    ON_EVERY_BACKEND;
    Bench bench(backend);
    constexpr int rounds = 20000;
    std::atomic<int> asked{0};
    std::atomic<int> answered{0};
    // One round needs one wake: the next question is put only when the last was answered.
    std::thread other([&] {
        for (int i = 1; i <= rounds; i++) {
            asked.store(i);
            bench.wake();
            while (answered.load() != i) {
                if (i % 2 == 0) {
                    sched_yield();
                }
            }
        }
    });
    while (answered.load() != rounds) {
        if (!bench.woken()) {
            vkp_test_fail("backend %s lost a wake", backend->name);
        }
        answered.store(asked.load());
    }
    other.join();
    CHECK(asked.load() == rounds);
}

TEST_CASE("backend: wakes from many threads at once")
{
    ON_EVERY_BACKEND;
    Bench bench(backend);
    std::atomic<int> done{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; t++) {
        threads.emplace_back([&] {
            for (int i = 0; i < 5000; i++) {
                bench.wake();
            }
            done.fetch_add(1);
            bench.wake();
        });
    }
    while (done.load() != 4) {
        if (!bench.woken()) {
            vkp_test_fail("backend %s lost a wake", backend->name);
        }
    }
    for (std::thread &thread : threads) {
        thread.join();
    }
    CHECK(bench.early_returns(100) <= 2);
}

namespace {

Bench *signalled_bench;
std::atomic<int> handlers_run{0};
std::atomic<bool> errno_changed{false};

void wake_in_handler(int)
{
    handlers_run.fetch_add(1); // before the wakes: who is woken by the last of them counts it
    errno = E2BIG;
    for (int i = 0; i < 10; i++) {
        signalled_bench->wake();
    }
    errno_changed.store(errno_changed.load() || errno != E2BIG);
}

} // namespace

TEST_CASE("backend: wake from a signal handler")
{
    ON_EVERY_BACKEND;
    Bench bench(backend);
    signalled_bench = &bench;
    handlers_run = 0;
    errno_changed = false;
    struct sigaction action = {};
    struct sigaction before = {};
    action.sa_handler = wake_in_handler;
    action.sa_flags = SA_RESTART;
    REQUIRE(sigaction(SIGUSR1, &action, &before) == 0);
    SECTION("on the waiting thread, before it waits")
    {
        raise(SIGUSR1);
        CHECK(handlers_run == 1);
        CHECK(bench.woken());
        CHECK(bench.early_returns(10) == 0);
    }
    SECTION("on another thread: nothing but the wake ends the wait")
    {
        std::thread other([] {
            for (int i = 0; i < 100; i++) {
                pthread_kill(pthread_self(), SIGUSR1);
            }
        });
        while (handlers_run.load() < 100) {
            if (!bench.woken()) {
                vkp_test_fail("backend %s lost a wake", backend->name);
            }
        }
        other.join();
        CHECK(bench.early_returns(10) <= 1);
    }
    REQUIRE(sigaction(SIGUSR1, &before, nullptr) == 0);
    CHECK_FALSE(errno_changed);
}

// ---- fork ----

namespace {

// Runs the function in a child; its result is the child's exit code.
template <typename Function>
int in_child(Function function)
{
    pid_t pid = fork();
    if (pid == 0) {
        _exit(function());
    }
    int status = -1;
    while (pid > 0 && waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

} // namespace

TEST_CASE("backend: after_fork parts the child from its parent")
{
    ON_EVERY_BACKEND;
    const bool pipe_wake = GENERATE(false, true);
    INFO((pipe_wake ? "wake over a pipe" : "the platform's wake"));
    Pipe pipe;
    Bench bench(backend, pipe_wake);
    REQUIRE(bench.watch(pipe.reader, VKP_IO_READ, 1) == VKP_OK);
    put(pipe.writer);
    SECTION("the child's watches are its own, and the old ones still there")
    {
        CHECK(in_child([&] {
                  if (bench.after_fork() != VKP_OK) {
                      return 1;
                  }
                  if (bench.ready() != Ready{{1, VKP_IO_READ}} || bench.ready().size() != 1) {
                      return 2;
                  }
                  if (bench.watch(pipe.reader, 0) != VKP_OK || !bench.ready().empty()) {
                      return 3;
                  }
                  return bench.watch(pipe.writer, VKP_IO_WRITE, 9) == VKP_OK ? 0 : 4;
              }) == 0);
        CHECK(bench.ready() == Ready{{1, VKP_IO_READ}});
        CHECK(bench.ready() == Ready{{1, VKP_IO_READ}});
    }
    SECTION("a wake in the child is none in the parent")
    {
        REQUIRE(bench.watch(pipe.reader, 0) == VKP_OK);
        CHECK(in_child([&] {
                  if (bench.after_fork() != VKP_OK) {
                      return 1;
                  }
                  bench.wake();
                  return bench.woken() ? 0 : 2;
              }) == 0);
        CHECK(bench.early_returns(10) == 0);
    }
    SECTION("a wake from before is lost in neither")
    {
        REQUIRE(bench.watch(pipe.reader, 0) == VKP_OK);
        bench.wake();
        CHECK(in_child([&] {
                  if (bench.after_fork() != VKP_OK) {
                      return 1;
                  }
                  return bench.woken() && bench.early_returns(10) <= 1 ? 0 : 2;
              }) == 0);
        CHECK(bench.woken());
        CHECK(bench.early_returns(10) == 0);
    }
    SECTION("a child that only closes leaves the parent alone")
    {
        CHECK(in_child([&] {
                  if (bench.after_fork() != VKP_OK) {
                      return 1;
                  }
                  bench.close();
                  return bench.blocks() == 0 ? 0 : 2;
              }) == 0);
        CHECK(bench.ready() == Ready{{1, VKP_IO_READ}});
    }
    SECTION("a failure is reported, and the state can still be closed")
    {
        for (Fault Faults::*fault : faults_of_opening) {
            faults.*fault = -ENFILE;
            errno = 0;
            const vkp_status status = bench.after_fork();
            CHECK(status == ((faults.*fault).hits > 0 ? VKP_ERR_SYS : VKP_OK));
            if (status != VKP_OK) {
                CHECK(errno == ENFILE);
            }
            bench.wake();
            faults.*fault = 0;
        }
        REQUIRE(bench.after_fork() == VKP_OK);
        CHECK(bench.ready() == Ready{{1, VKP_IO_READ}});
        bench.close();
        CHECK(bench.fds_more() == 0);
        CHECK(bench.blocks() == 0);
    }
}

TEST_CASE("backend: a forked child closes no descriptor that is not the backend's")
{
    ON_EVERY_BACKEND;
    const bool after_fork = GENERATE(false, true);
    INFO((after_fork ? "after_fork, then close" : "close alone"));
    Pipe pipe;
    Bench bench(backend);
    REQUIRE(bench.watch(pipe.reader, VKP_IO_READ, 1) == VKP_OK);
    struct stat expected = {};
    REQUIRE(fstat(pipe.reader, &expected) == 0);
    CHECK(in_child([&] {
              // Numbers that were free at the fork, a queue's that is not inherited among them.
              std::vector<Fd> taken;
              for (int i = 0; i < 16; i++) {
                  taken.emplace_back(dup(pipe.reader));
              }
              if (after_fork && bench.after_fork() != VKP_OK) {
                  return 1;
              }
              bench.close();
              for (const Fd &fd : taken) {
                  struct stat found = {};
                  if (fstat(fd, &found) != 0 || found.st_ino != expected.st_ino) {
                      return 2;
                  }
              }
              return bench.blocks() == 0 ? 0 : 3;
          }) == 0);
    put(pipe.writer);
    CHECK(bench.ready() == Ready{{1, VKP_IO_READ}});
}

// ---- faults ----

TEST_CASE("backend: an open that fails leaves nothing behind")
{
    ON_EVERY_BACKEND;
    Host host(backend);
    int failures = 0;
    for (Fault Faults::*fault : faults_of_opening) {
        for (const int error : {EMFILE, ENOMEM, ENOSPC}) {
            faults = Faults();
            faults.*fault = -error;
            errno = 0;
            const vkp_status status = host.open();
            CHECK(status == ((faults.*fault).hits > 0 ? VKP_ERR_SYS : VKP_OK));
            if (status != VKP_OK) {
                CHECK(errno == error);
                CHECK_FALSE(host.is_open());
                failures++;
            }
            host.close();
            CHECK(host.blocks() == 0);
            CHECK(host.fds_more() == 0);
        }
    }
    CHECK((is_guest() || failures > 0)); // a foreign loop may need none of these calls
}

TEST_CASE("backend: a wait that fails says so and can be repeated")
{
    ON_EVERY_BACKEND;
    Pipe pipe;
    Bench bench(backend);
    REQUIRE(bench.watch(pipe.reader, VKP_IO_READ, 1) == VKP_OK);
    put(pipe.writer);
    std::vector<vkp_event> events;
    for (const int error : {ENOMEM, EINVAL, EBADF}) {
        faults.wait = -error;
        errno = 0;
        CHECK(bench.try_wait(VKP_FOREVER, &events) == VKP_ERR_SYS);
        CHECK(errno == error);
        faults.wait = 0;
        CHECK(bench.ready() == Ready{{1, VKP_IO_READ}});
    }
}

TEST_CASE("backend: a watch that fails says so and changes nothing")
{
    ON_EVERY_BACKEND;
    Pipe pipe;
    Pipe other;
    Bench bench(backend);
    REQUIRE(bench.watch(pipe.reader, VKP_IO_READ, 1) == VKP_OK);
    put(pipe.writer);
    put(other.writer);
    faults.change = -ENOSPC;
    errno = 0;
    const vkp_status status = bench.watch(other.reader, VKP_IO_READ, 2);
    if (faults.change.hits == 0) {
        CHECK(status == VKP_OK); // no system call, so no fault; memory has its own test
        return;
    }
    CHECK(status == VKP_ERR_SYS);
    CHECK(errno == ENOSPC);
    CHECK(bench.watch(pipe.reader, VKP_IO_WRITE, 3) == VKP_ERR_SYS);
    CHECK(bench.ready() == Ready{{1, VKP_IO_READ}});
    SECTION("a removal never fails: what the kernel keeps is dropped when it reports")
    {
        CHECK(bench.watch(pipe.reader, 0) == VKP_OK);
        faults = Faults();
        CHECK(bench.ready() == Ready{});
        CHECK(bench.early_returns(10) <= 2);
    }
    SECTION("the same calls succeed afterwards")
    {
        faults = Faults();
        CHECK(bench.watch(other.reader, VKP_IO_READ, 2) == VKP_OK);
        CHECK(bench.watch(pipe.reader, VKP_IO_READ, 3) == VKP_OK);
        CHECK(bench.ready() == Ready{{2, VKP_IO_READ}, {3, VKP_IO_READ}});
    }
}

TEST_CASE("backend: every allocation may fail")
{
    ON_EVERY_BACKEND;
    Pipe pipe;
    std::vector<Fd> fds;
    for (int i = 0; i < 30; i++) { // libevent's first batch has room for 32
        fds.emplace_back(dup(pipe.reader));
        REQUIRE(int(fds.back()) >= 0);
    }
    put(pipe.writer);
    uint64_t k = 1;
    for (bool failed = true; failed; k++) {
        INFO("allocation " << k);
        Host host(backend);
        vkp_test_env_fault(&host.test, VKP_TEST_FAULT_ONCE, k);
        if (host.open() != VKP_OK) {
            CHECK(host.blocks() == 0);
            CHECK(host.fds_more() == 0);
            continue;
        }
        host.close();
        Bench bench(backend);
        const uint64_t used_by_open = vkp_test_env_calls(&bench.test);
        vkp_test_env_fault(&bench.test, VKP_TEST_FAULT_ONCE, k - std::min(k - 1, used_by_open));
        Ready expected;
        failed = false;
        for (size_t i = 0; i < fds.size(); i++) {
            vkp_status status = bench.watch(fds[i], VKP_IO_READ, i);
            if (status != VKP_OK) {
                CHECK(status == VKP_ERR_NOMEM);
                CHECK(bench.ready() == expected);
                CHECK(bench.watch(fds[i], 0) == VKP_OK);
                failed = true;
                REQUIRE(bench.watch(fds[i], VKP_IO_READ, i) == VKP_OK);
            }
            expected[i] = VKP_IO_READ;
        }
        CHECK(bench.ready() == expected);
    }
    CHECK(k > 3); // it did fail: once in open, and once in watch
}

// ---- what some backends offer ----

TEST_CASE("backend: the pollable descriptor is readable when a wait would end")
{
    ON_EVERY_BACKEND;
    Pipe pipe;
    Bench bench(backend);
    const int fd = bench.pollable_fd();
    if (fd < 0) {
        CHECK(fd == -1);
        return;
    }
    const auto readable = [&] {
        pollfd entry = {fd, POLLIN, 0};
        return poll(&entry, 1, 0) == 1;
    };
    CHECK_FALSE(readable());
    REQUIRE(bench.watch(pipe.reader, VKP_IO_READ, 1) == VKP_OK);
    CHECK_FALSE(readable());
    put(pipe.writer);
    CHECK(readable());
    take(pipe.reader);
    CHECK(bench.ready() == Ready{});
    CHECK_FALSE(readable());
    bench.wake();
    CHECK(readable());
    CHECK(bench.ready() == Ready{});
    CHECK_FALSE(readable());
}

// ---- in the loop ----

namespace {

// The parts of a small program on the loop.
struct Program {
    explicit Program(const vkp_backend *backend)
    {
        vkp_test_env_init(&test);
        test.env.sys = faulty_sys();
        faults = Faults();
        vkp_loop_config config = {};
        config.backend = backend;
        config.env = &test.env;
        if (vkp_loop_open(&config, &loop) != VKP_OK) {
            vkp_test_fail("no loop over %s", backend->name);
        }
    }
    ~Program()
    {
        vkp_loop_close(loop);
        vkp_loop_unref(loop);
        vkp_test_env_deinit(&test);
    }
    Program(const Program &) = delete;
    Program &operator=(const Program &) = delete;

    vkp_test_env test;
    vkp_loop *loop = nullptr;
};

struct Reader : vkp_io {
    std::vector<std::unique_ptr<Reader>> *all;
    Pipe pipe;
    int calls = 0;
    Reader() : vkp_io()
    {
    }
    void end()
    {
        vkp_io_stop(this);
        pipe.reader.reset();
    }
};

struct Alarm : vkp_timer {
    uint64_t deadline_ns = 0;
    std::vector<size_t> *order = nullptr;
    size_t index = 0;
    bool early = false;
    Alarm() : vkp_timer()
    {
    }
};

} // namespace

TEST_CASE("backend: in the loop, callbacks close their own descriptors and others'")
{
    ON_EVERY_BACKEND;
    Program program(backend);
    std::vector<std::unique_ptr<Reader>> readers;
    for (int i = 0; i < 12; i++) {
        readers.push_back(std::make_unique<Reader>());
        Reader &reader = *readers.back();
        reader.all = &readers;
        put(reader.pipe.writer);
        REQUIRE(vkp_io_start(&reader, program.loop, reader.pipe.reader, VKP_IO_READ,
                             [](vkp_io *watch, uint32_t) {
                                 Reader *self = static_cast<Reader *>(watch);
                                 self->calls++;
                                 for (auto &other : *self->all) { // all of the batch but the last
                                     if (other->calls == 0 && other != self->all->back()) {
                                         other->end();
                                     }
                                 }
                                 self->end();
                             }) == VKP_OK);
    }
    int calls = 0;
    const auto count = [&] {
        calls = 0;
        for (const auto &reader : readers) {
            calls += reader->calls;
        }
        return calls;
    };
    vkp_test_run_until(program.loop, "the last reader", [&] { return readers.back()->calls > 0; });
    for (int i = 0; i < 5; i++) {
        REQUIRE(vkp_loop_run_once(program.loop, 0) == VKP_OK);
    }
    CHECK(readers.back()->calls == 1);
    CHECK(count() <= 2); // of the others at most one was first
}

TEST_CASE("backend: in the loop, timers fire in order and not early, whatever else happens")
{
    ON_EVERY_BACKEND;
    Program program(backend);
    constexpr size_t count = 60;
    std::vector<Alarm> alarms(count);
    std::vector<size_t> order;
    std::vector<size_t> expected(count);
    const uint64_t start = vkp_loop_get_now_ns(program.loop);
    for (size_t i = 0; i < count; i++) {
        // Shuffled, some of them equal, some in the past.
        alarms[i].deadline_ns = start + (i * 37 % 20) * (ms / 3);
        alarms[i].order = &order;
        alarms[i].index = i;
        expected[i] = i;
        REQUIRE(vkp_timer_start(
                    &alarms[i], program.loop,
                    [](vkp_timer *timer) {
                        Alarm *self = static_cast<Alarm *>(timer);
                        self->order->push_back(self->index);
                        self->early = vkp_loop_get_now_ns(self->i_loop) < self->deadline_ns;
                    },
                    0, alarms[i].deadline_ns) == VKP_OK);
    }
    std::stable_sort(expected.begin(), expected.end(), [&](size_t a, size_t b) {
        return alarms[a].deadline_ns < alarms[b].deadline_ns;
    });
    Reader reader; // its events end waits again and again
    REQUIRE(vkp_io_start(&reader, program.loop, reader.pipe.reader, VKP_IO_READ,
                         [](vkp_io *watch, uint32_t) {
                             take(static_cast<Reader *>(watch)->pipe.reader, 1);
                         }) == VKP_OK);
    int rounds = 0;
    vkp_test_run_until(program.loop, "all timers", [&] {
        if (rounds++ % 2 == 0) {
            put(reader.pipe.writer);
        }
        return order.size() == count;
    });
    CHECK(order == expected);
    CHECK(std::none_of(alarms.begin(), alarms.end(), [](const Alarm &each) { return each.early; }));
    vkp_io_stop(&reader);
}

// ---- the null backend alone ----

TEST_CASE("null backend: events come in ascending order of descriptors")
{
    std::vector<Pipe> pipes(12);
    Bench bench(&vkp_backend_null);
    for (size_t i = 0; i < pipes.size(); i++) {
        const Pipe &pipe = pipes[(i * 7) % pipes.size()];
        REQUIRE(bench.watch(pipe.reader, VKP_IO_READ, static_cast<uint64_t>(int(pipe.reader))) ==
                VKP_OK);
    }
    for (size_t i = 0; i < pipes.size(); i++) {
        put(pipes[(i * 5) % pipes.size()].writer);
    }
    std::vector<uint64_t> all;
    for (const vkp_event &event : bench.wait(0)) {
        all.push_back(event.token);
    }
    CHECK(all.size() == pipes.size());
    CHECK(std::is_sorted(all.begin(), all.end()));
    // Cut off: each batch goes on above the one before, then begins anew.
    std::vector<uint64_t> parts;
    for (int i = 0; i < 3; i++) {
        for (const vkp_event &event : bench.wait(0, 5)) {
            parts.push_back(event.token);
        }
    }
    CHECK(parts == all);
    CHECK(bench.wait(0, 1).front().token == all.front());
}

TEST_CASE("null backend: the clock stands still, and jumps to the deadline when nothing is ready")
{
    Pipe pipe;
    Bench bench(&vkp_backend_null);
    REQUIRE(bench.watch(pipe.reader, VKP_IO_READ, 1) == VKP_OK);
    const uint64_t start = bench.now();
    const uint64_t hour = uint64_t(3600) * 1000 * ms;
    CHECK(bench.wait(start + hour).empty());
    CHECK(bench.now() == start + hour);
    CHECK(bench.wait(start).empty());
    CHECK(bench.now() == start + hour);
    put(pipe.writer);
    CHECK(bench.wait(start + 2 * hour).size() == 1);
    CHECK(bench.now() == start + hour);
    bench.wake();
    take(pipe.reader);
    CHECK(bench.wait(start + 2 * hour).empty());
    CHECK(bench.now() == start + hour);
    CHECK(bench.wait(start + 2 * hour).empty());
    CHECK(bench.now() == start + 2 * hour);
    faults.wait = -EINTR;
    CHECK(bench.wait(start + 3 * hour).empty());
    CHECK(bench.now() == start + 2 * hour);
}
