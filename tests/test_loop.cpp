// SPDX-License-Identifier: MIT
//
// The event loop over every backend of this platform: rounds, stops, posts, timers, watches of
// descriptors and channels, close. On the null backend time is virtual, so hours pass at once.
#include "support/catch.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "support/support.h"

namespace {

constexpr uint64_t ms = 1000000;
constexpr int crowd = 30; // that one round reports: libevent's first batch has room for 32

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

// A loop that checks at its end that it gave everything back.
class Loop {
  public:
    explicit Loop(const vkp_backend *backend) : fds_before_(vkp_test_fd_count()), backend_(backend)
    {
        vkp_test_env_init(&test);
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
        vkp_test_env_deinit(&test);
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
    size_t blocks()
    {
        return vkp_test_env_live_blocks(&test);
    }
    int fds_more() const
    {
        return vkp_test_fd_count() - fds_before_;
    }
    bool is_virtual() const
    {
        return (backend_->flags & VKP_BACKEND_VIRTUAL_TIME) != 0;
    }
    uint64_t now() const
    {
        return vkp_loop_get_now_ns(loop_);
    }
    // For rounds that something must end: a virtual clock would jump there instead.
    uint64_t patience() const
    {
        return is_virtual() ? VKP_FOREVER : vkp_test_deadline();
    }
    void round(uint64_t deadline_ns = 0)
    {
        if (vkp_loop_run_once(loop_, deadline_ns) != VKP_OK) {
            vkp_test_fail("a round failed");
        }
    }

    vkp_test_env test;

  private:
    int fds_before_;
    const vkp_backend *backend_;
    vkp_loop *loop_ = nullptr;
};

// A posted call of any shape; deletes itself when it runs.
vkp_status post(vkp_loop *loop, std::function<void()> what)
{
    auto *call = new std::function<void()>(std::move(what));
    vkp_status status = vkp_loop_post(
        loop,
        [](void *user) {
            std::unique_ptr<std::function<void()>> own(static_cast<std::function<void()> *>(user));
            (*own)();
        },
        call);
    if (status != VKP_OK) {
        delete call;
    }
    return status;
}

struct Timer : vkp_timer {
    std::function<void()> fn;
    Timer() : vkp_timer()
    {
    }
    Timer(const Timer &) = delete;
    Timer &operator=(const Timer &) = delete;
    ~Timer()
    {
        vkp_timer_stop(this);
    }
    vkp_status start(vkp_loop *loop, uint64_t deadline_ns, uint64_t period_ns,
                     std::function<void()> what)
    {
        fn = std::move(what);
        return restart(loop, deadline_ns, period_ns);
    }
    vkp_status restart(vkp_loop *loop, uint64_t deadline_ns, uint64_t period_ns = 0)
    {
        return vkp_timer_start(
            this, loop, [](vkp_timer *timer) { static_cast<Timer *>(timer)->fn(); }, period_ns,
            deadline_ns);
    }
};

struct Watch : vkp_io {
    std::function<void(uint32_t)> fn;
    Watch() : vkp_io()
    {
    }
    Watch(const Watch &) = delete;
    Watch &operator=(const Watch &) = delete;
    ~Watch()
    {
        vkp_io_stop(this);
    }
    vkp_status start(vkp_loop *loop, int fd, uint32_t interest, std::function<void(uint32_t)> what)
    {
        fn = std::move(what);
        return vkp_io_start(this, loop, fd, interest, [](vkp_io *watch, uint32_t ready) {
            static_cast<Watch *>(watch)->fn(ready);
        });
    }
};

class Pipe {
  public:
    Pipe()
    {
        if (pipe(fds_) != 0) {
            vkp_test_fail("no pipe: %s", strerror(errno));
        }
    }
    ~Pipe()
    {
        close_reader();
        close_writer();
    }
    Pipe(const Pipe &) = delete;
    Pipe &operator=(const Pipe &) = delete;
    int reader() const
    {
        return fds_[0];
    }
    int writer() const
    {
        return fds_[1];
    }
    void put()
    {
        if (write(fds_[1], "x", 1) != 1) {
            vkp_test_fail("a write to a pipe failed");
        }
    }
    void take()
    {
        char byte;
        if (read(fds_[0], &byte, 1) != 1) {
            vkp_test_fail("a read from a pipe failed");
        }
    }
    void close_reader()
    {
        shut(0);
    }
    void close_writer()
    {
        shut(1);
    }
    // Gives the reading end this number.
    void move_reader(int number)
    {
        if (fds_[0] != number) {
            if (dup2(fds_[0], number) != number) {
                vkp_test_fail("dup2 failed");
            }
            shut(0);
            fds_[0] = number;
        }
    }

  private:
    void shut(int end)
    {
        if (fds_[end] >= 0) {
            ::close(fds_[end]);
        }
        fds_[end] = -1;
    }
    int fds_[2];
};

} // namespace

// ---- open, close ----

TEST_CASE("loop: open refuses what cannot work, and says which files to link")
{
    vkp_test_env test;
    vkp_test_env_init(&test);
    vkp_loop_config config = {};
    config.env = &test.env;
    vkp_loop *loop = nullptr;
    CHECK(vkp_loop_open(nullptr, &loop) == VKP_ERR_INVALID);
    CHECK(vkp_loop_open(&config, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_loop_open(&config, &loop) == VKP_ERR_INVALID);
    CHECK(vkp_test_env_logged(&test, "backends/"));
    vkp_test_env_log_clear(&test);
    vkp_backend other = vkp_backend_poll;
    other.abi = VKP_BACKEND_ABI + 1;
    config.backend = &other;
    CHECK(vkp_loop_open(&config, &loop) == VKP_ERR_INVALID);
    CHECK(vkp_test_env_logged(&test, "version"));
    CHECK(loop == nullptr);
    CHECK(vkp_test_env_live_blocks(&test) == 0);
    vkp_test_env_deinit(&test);
}

TEST_CASE("loop: open and close leave nothing behind")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    SECTION("close is idempotent, and the last reference frees")
    {
        vkp_loop *mine = vkp_loop_ref(loop);
        CHECK(mine == static_cast<vkp_loop *>(loop));
        vkp_loop_close(loop);
        vkp_loop_close(loop);
        loop.close();
        CHECK(loop.blocks() > 0);
        CHECK(vkp_loop_post(
                  mine, [](void *) {}, nullptr) == VKP_ERR_CLOSED);
        CHECK(vkp_loop_run(mine) == VKP_ERR_INVALID);
        CHECK(vkp_loop_run_once(mine, 0) == VKP_ERR_INVALID);
        vkp_loop_unref(mine);
    }
    SECTION("the last reference closes")
    {
        int ran = 0;
        REQUIRE(post(loop, [&] { ran++; }) == VKP_OK);
        vkp_loop *mine = vkp_loop_ref(loop);
        vkp_loop_unref(mine);
        loop.close();
        CHECK(ran == 1);
    }
    vkp_loop_unref(nullptr);
    loop.close();
    CHECK(loop.blocks() == 0);
    CHECK(loop.fds_more() == 0);
}

TEST_CASE("loop: every allocation of open may fail")
{
    ON_EVERY_BACKEND;
    vkp_test_env test;
    vkp_test_env_init(&test);
    vkp_loop_config config = {};
    config.backend = backend;
    config.env = &test.env;
    const int fds = vkp_test_fd_count();
    uint64_t k = 1;
    for (;; k++) {
        INFO("allocation " << k);
        vkp_loop *loop = nullptr;
        vkp_test_env_fault(&test, VKP_TEST_FAULT_ONCE, k);
        vkp_status status = vkp_loop_open(&config, &loop);
        vkp_test_env_fault(&test, VKP_TEST_FAULT_NONE, 0);
        if (status == VKP_OK) {
            vkp_loop_unref(loop);
            break;
        }
        CHECK(status == VKP_ERR_NOMEM);
        CHECK(loop == nullptr);
        CHECK(vkp_test_env_live_blocks(&test) == 0);
        CHECK(vkp_test_fd_count() == fds);
    }
    CHECK(k > 3); // the loop, its events, the backend's state at least
    CHECK(vkp_test_env_live_blocks(&test) == 0);
    CHECK(vkp_test_fd_count() == fds);
    vkp_test_env_deinit(&test);
}

TEST_CASE("loop: a backend that fails ends the run with its status")
{
    static const vkp_sys *const real = vkp_sys_get_default();
    static int fault;
    fault = 0;
    vkp_sys sys = *real;
    sys.poll = [](void *fds, size_t count, uint64_t deadline_ns) {
        return fault != 0 ? fault : real->poll(fds, count, deadline_ns);
    };
    sys.wake_pair = [](int fds[2]) { return fault != 0 ? fault : real->wake_pair(fds); };
    vkp_test_env test;
    vkp_test_env_init(&test);
    test.env.sys = &sys;
    vkp_loop_config config = {};
    config.backend = &vkp_backend_poll;
    config.env = &test.env;
    vkp_loop *loop = nullptr;
    fault = -EMFILE;
    errno = 0;
    CHECK(vkp_loop_open(&config, &loop) == VKP_ERR_SYS);
    CHECK(errno == EMFILE);
    CHECK(vkp_test_env_live_blocks(&test) == 0);
    fault = 0;
    REQUIRE(vkp_loop_open(&config, &loop) == VKP_OK);
    fault = -ENOMEM;
    int ran = 0;
    REQUIRE(post(loop, [&] { ran++; }) == VKP_OK);
    CHECK(vkp_loop_run(loop) == VKP_ERR_SYS);
    CHECK(ran == 1);
    CHECK(vkp_loop_run_once(loop, 0) == VKP_ERR_SYS);
    fault = 0;
    CHECK(vkp_loop_run_once(loop, 0) == VKP_OK);
    vkp_loop_unref(loop);
    vkp_test_env_deinit(&test);
}

// ---- run, stop ----

TEST_CASE("loop: stop ends the run under way, or the next one, once")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    vkp_loop_stop(loop);
    vkp_loop_stop(loop);
    CHECK(vkp_loop_run(loop) == VKP_OK);
    int rounds = 0;
    std::function<void()> again = [&] {
        rounds++;
        if (rounds == 5) {
            vkp_loop_stop(loop);
        }
        if (rounds < 5 && post(loop, again) != VKP_OK) {
            vkp_test_fail("a post was refused");
        }
    };
    REQUIRE(post(loop, again) == VKP_OK);
    CHECK(vkp_loop_run(loop) == VKP_OK);
    CHECK(rounds == 5); // the stops from before were used up
}

TEST_CASE("loop: stop from another thread")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    for (int i = 0; i < 200; i++) {
        std::thread other([&] { vkp_loop_stop(loop); });
        CHECK(vkp_loop_run(loop) == VKP_OK);
        other.join();
        loop.round(); // takes the wake of a stop that came before the run
    }
}

namespace {
vkp_loop *signalled_loop;
}

TEST_CASE("loop: stop from a signal handler")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    signalled_loop = loop;
    struct sigaction action = {};
    struct sigaction before = {};
    action.sa_handler = [](int) { vkp_loop_stop(signalled_loop); };
    action.sa_flags = SA_RESTART;
    REQUIRE(sigaction(SIGUSR1, &action, &before) == 0);
    SECTION("on this thread, before the run")
    {
        raise(SIGUSR1);
        CHECK(vkp_loop_run(loop) == VKP_OK);
    }
    SECTION("on this thread, inside a callback")
    {
        REQUIRE(post(loop, [] { raise(SIGUSR1); }) == VKP_OK);
        CHECK(vkp_loop_run(loop) == VKP_OK);
    }
    SECTION("on another thread")
    {
        std::thread other([] { pthread_kill(pthread_self(), SIGUSR1); });
        CHECK(vkp_loop_run(loop) == VKP_OK);
        other.join();
    }
    REQUIRE(sigaction(SIGUSR1, &before, nullptr) == 0);
}

TEST_CASE("loop: a run inside a run is refused")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    std::vector<vkp_status> inside;
    REQUIRE(post(loop, [&] {
                inside.push_back(vkp_loop_run(loop));
                inside.push_back(vkp_loop_run_once(loop, 0));
                vkp_loop_close(loop); // ignored here
                vkp_loop_stop(loop);
            }) == VKP_OK);
    CHECK(vkp_loop_run(loop) == VKP_OK);
    CHECK(inside == std::vector<vkp_status>{VKP_ERR_INVALID, VKP_ERR_INVALID});
    CHECK(post(loop, [] {}) == VKP_OK);
}

TEST_CASE("loop: the loop has one thread at a time")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    std::vector<vkp_status> elsewhere;
    REQUIRE(post(loop, [&] {
                std::thread other([&] {
                    vkp_timer timer = {};
                    elsewhere.push_back(vkp_loop_run(loop));
                    elsewhere.push_back(vkp_loop_run_once(loop, 0));
                    elsewhere.push_back(vkp_timer_start(
                        &timer, loop, [](vkp_timer *) {}, 0, 0));
                });
                other.join();
                vkp_loop_stop(loop);
            }) == VKP_OK);
    CHECK(vkp_loop_run(loop) == VKP_OK);
    CHECK(elsewhere == std::vector<vkp_status>(3, VKP_ERR_INVALID));
    // Afterwards any other may have it.
    vkp_status next = VKP_ERR_INVALID;
    vkp_loop_stop(loop);
    std::thread other([&] { next = vkp_loop_run(loop); });
    other.join();
    CHECK(next == VKP_OK);
}

TEST_CASE("loop: another thread that wants to run a running loop is refused, and harmless")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    std::atomic<bool> running{false};
    std::vector<vkp_status> elsewhere;
    REQUIRE(post(loop, [&] { running.store(true); }) == VKP_OK);
    std::thread other([&] {
        while (!running.load()) {
        }
        for (int i = 0; i < 100; i++) {
            elsewhere.push_back(vkp_loop_run(loop));
            elsewhere.push_back(vkp_loop_run_once(loop, 0));
            if (post(loop, [] {}) != VKP_OK) { // keeps the rounds coming
                vkp_test_fail("a post was refused");
            }
        }
        vkp_loop_stop(loop);
    });
    CHECK(vkp_loop_run(loop) == VKP_OK);
    other.join();
    CHECK(elsewhere == std::vector<vkp_status>(200, VKP_ERR_INVALID));
}

TEST_CASE("loop: a guest backend is not run")
{
    vkp_backend guest = vkp_backend_poll;
    guest.flags = VKP_BACKEND_GUEST;
    guest.timer = [](void *, uint64_t) { return VKP_OK; };
    Loop loop(&guest);
    CHECK(vkp_loop_run(loop) == VKP_ERR_INVALID);
}

namespace {

// A guest over poll whose foreign loop is the test: what it is told is written down.
struct Told {
    const vkp_backend_host *host = nullptr;
    std::vector<uint64_t> deadlines;
    vkp_status answer = VKP_OK;
    uint64_t last() const
    {
        return deadlines.empty() ? 1 : deadlines.back();
    }
    void round()
    {
        host->round(host->loop);
    }
};
Told told;

const vkp_backend *told_guest()
{
    static const vkp_backend guest = [] {
        vkp_backend copy = vkp_backend_poll;
        copy.flags = VKP_BACKEND_GUEST;
        copy.open = [](const vkp_backend_host *host, void **state) {
            told.host = host;
            return vkp_backend_poll.open(host, state);
        };
        copy.timer = [](void *, uint64_t deadline_ns) {
            told.deadlines.push_back(deadline_ns);
            return told.answer;
        };
        return copy;
    }();
    told = Told();
    return &guest;
}

} // namespace

TEST_CASE("loop: a guest is told when its next round is due, and no more often than needed")
{
    Loop loop(told_guest());
    CHECK(told.deadlines == std::vector<uint64_t>{0}); // what was posted before waits for it
    int ran = 0;
    REQUIRE(post(loop, [&] { ran++; }) == VKP_OK);
    told.round();
    CHECK(ran == 1);
    CHECK(told.deadlines == std::vector<uint64_t>{0, VKP_FOREVER});
    told.deadlines.clear();
    told.round();
    CHECK(told.deadlines.empty());

    const uint64_t hour = uint64_t(3600) * 1000 * ms;
    const uint64_t start = loop.now();
    SECTION("timers, also between rounds")
    {
        Timer first;
        Timer second;
        Timer third;
        REQUIRE(second.start(loop, start + 2 * hour, 0, [] {}) == VKP_OK);
        REQUIRE(first.start(loop, start + hour, 0, [] {}) == VKP_OK);
        REQUIRE(third.start(loop, start + 3 * hour, 0, [] {}) == VKP_OK);
        CHECK(told.deadlines == std::vector<uint64_t>{start + 2 * hour, start + hour});
        vkp_timer_stop(&third);
        vkp_timer_stop(&first);
        CHECK(told.last() == start + 2 * hour);
        told.round();
        CHECK(told.deadlines.size() == 3);
        vkp_timer_stop(&second);
        CHECK(told.last() == VKP_FOREVER);
        CHECK(told.deadlines.size() == 4);
        // A timer of the guest's has gone off by the round at its deadline: it is told again.
        int fired = 0;
        REQUIRE(first.start(loop, start, 0, [&] { fired++; }) == VKP_OK);
        CHECK(told.last() <= loop.now());
        told.round();
        CHECK(fired == 1);
        CHECK(told.last() == VKP_FOREVER);
        CHECK(told.deadlines.size() == 6);
    }
    SECTION("work that makes work: round by round, not within one")
    {
        int rounds = 0;
        std::function<void()> again = [&] {
            if (++rounds < 3 && post(loop, again) != VKP_OK) {
                vkp_test_fail("a post was refused");
            }
        };
        REQUIRE(post(loop, again) == VKP_OK);
        for (int i = 1; i <= 3; i++) {
            told.round();
            CHECK(rounds == i);
        }
        CHECK(told.deadlines == std::vector<uint64_t>{0, 0, VKP_FOREVER});
    }
    SECTION("what is deferred between rounds, once")
    {
        int fds[2];
        vkp_test_socket_pair(fds);
        vkp_conn_ops ops = {};
        vkp_conn_config config = {};
        config.ops = &ops;
        config.loop_only = true; // nor is its inbox under watch
        vkp_conn *conn = nullptr;
        REQUIRE(vkp_conn_open(loop, fds[0], &config, &conn) == VKP_OK);
        told.round();
        told.deadlines.clear();
        vkp_bytes frame;
        REQUIRE(vkp_bytes_copy(&loop.test.env, "x", 1, &frame) == VKP_OK);
        for (int i = 0; i < 10; i++) {
            REQUIRE(vkp_conn_send(conn, &frame) == VKP_OK);
        }
        vkp_bytes_unref(&frame);
        CHECK(told.deadlines == std::vector<uint64_t>{0});
        told.round();
        CHECK(told.last() == VKP_FOREVER);
        char text[16];
        CHECK(read(fds[1], text, sizeof text) == 10);
        close(fds[1]);
        vkp_conn_close(conn);
        vkp_conn_unref(conn);
    }
    SECTION("objects without a deadline: one that is not VKP_FOREVER, and never comes")
    {
        vkp_mpsc_config config = {};
        config.elem_bytes = 1;
        vkp_mpsc_tx *tx = nullptr;
        vkp_mpsc_rx *rx = nullptr;
        REQUIRE(vkp_mpsc_open(&config, &tx, &rx) == VKP_OK);
        vkp_handler *handler = nullptr;
        REQUIRE(vkp_test_handle(
                    loop, rx, [](void *) {}, nullptr, &handler) == VKP_OK);
        CHECK(told.last() != VKP_FOREVER);
        CHECK(told.last() > start + 24 * 365 * hour);
        told.round();
        vkp_handler_unref(handler);
        CHECK(told.last() == VKP_FOREVER);
        vkp_mpsc_tx_unref(tx);
        vkp_mpsc_rx_unref(rx);
    }
    SECTION("an end: there is no next round")
    {
        Timer timer;
        REQUIRE(timer.start(loop, start + hour, 0, [] {}) == VKP_OK);
        vkp_loop_close(loop);
        CHECK(told.last() == VKP_FOREVER);
        const size_t times = told.deadlines.size();
        told.round();
        vkp_timer_stop(&timer);
        CHECK(told.deadlines.size() == times);
    }
}

TEST_CASE("loop: a guest that asks for a round inside one is told anew at its end")
{
    Loop loop(told_guest());
    told.round();
    Timer timer;
    REQUIRE(timer.start(loop, loop.now() + uint64_t(3600) * 1000 * ms, 0, [] {}) == VKP_OK);
    const std::vector<uint64_t> before = told.deadlines;
    int ran = 0;
    REQUIRE(post(loop, [&] {
                ran++;
                if (post(loop, [&] { ran += 10; }) != VKP_OK) {
                    vkp_test_fail("a post was refused");
                }
                told.round();
                ran += ran == 1 ? 100 : 0;
            }) == VKP_OK);
    told.round();
    CHECK(ran == 101);
    CHECK(told.last() == 0);
    told.round();
    CHECK(ran == 111);
    CHECK(told.last() == before.back());
    REQUIRE(post(loop, [] { told.round(); }) == VKP_OK);
    const size_t times = told.deadlines.size();
    told.round();
    CHECK(told.deadlines.size() == times + 1); // its timer may have gone off for nothing
    CHECK(told.last() == before.back());
}

TEST_CASE("loop: a guest without a timer fails what needs one")
{
    const int fds = vkp_test_fd_count();
    vkp_test_env test;
    vkp_test_env_init(&test);
    vkp_loop_config config = {};
    config.backend = told_guest();
    config.env = &test.env;
    vkp_loop *loop = nullptr;
    told.answer = VKP_ERR_NOMEM;
    CHECK(vkp_loop_open(&config, &loop) == VKP_ERR_NOMEM);
    CHECK(vkp_test_env_live_blocks(&test) == 0);
    CHECK(vkp_test_fd_count() == fds);
    vkp_test_env_deinit(&test);
    Loop other(told_guest());
    Timer timer;
    int fired = 0;
    told.answer = VKP_ERR_NOMEM;
    CHECK(timer.start(other, 0, 0, [&] { fired++; }) == VKP_ERR_NOMEM);
    told.answer = VKP_OK;
    told.round();
    CHECK(fired == 0);
    CHECK(told.last() == VKP_FOREVER);
}

TEST_CASE("loop: a single round waits until its deadline, or not at all")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    loop.round(0);
    const uint64_t deadline = loop.now() + 3 * ms;
    loop.round(deadline);
    CHECK(loop.now() >= deadline);
    loop.round(1);
    std::thread other([&] {
        if (post(loop, [] {}) != VKP_OK) {
            vkp_test_fail("a post was refused");
        }
    });
    loop.round(VKP_FOREVER); // ended by the post
    other.join();
}

// ---- posts ----

TEST_CASE("loop: posts of each thread run in order, each once")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    constexpr int threads = 4;
    constexpr int each = 3000;
    std::vector<int> next(threads, 0);
    int out_of_order = 0;
    int total = 0;
    struct Item {
        std::function<void(int, int)> *ran;
        int thread;
        int number;
    };
    std::function<void(int, int)> ran = [&](int thread, int number) {
        out_of_order += number != next[static_cast<size_t>(thread)] ? 1 : 0;
        next[static_cast<size_t>(thread)] = number + 1;
        if (++total == threads * each) {
            vkp_loop_stop(loop);
        }
    };
    std::vector<std::vector<Item>> items(threads);
    for (int t = 0; t < threads; t++) {
        for (int i = 0; i < each; i++) {
            items[static_cast<size_t>(t)].push_back({&ran, t, i});
        }
    }
    std::atomic<int> refused{0};
    std::vector<std::thread> posters;
    for (auto &own : items) {
        posters.emplace_back([&refused, &own, &loop] {
            for (Item &item : own) {
                vkp_status status = vkp_loop_post(
                    loop,
                    [](void *user) {
                        auto *it = static_cast<Item *>(user);
                        (*it->ran)(it->thread, it->number);
                    },
                    &item);
                refused.fetch_add(status == VKP_OK ? 0 : 1);
            }
        });
    }
    CHECK(vkp_loop_run(loop) == VKP_OK);
    for (std::thread &poster : posters) {
        poster.join();
    }
    CHECK(refused == 0);
    CHECK(out_of_order == 0);
    CHECK(total == threads * each);
}

TEST_CASE("loop: one post after the other finds the loop, asleep or not")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    constexpr int rounds = 5000;
    std::atomic<int> ran{0};
    std::thread other([&] {
        for (int i = 1; i <= rounds; i++) {
            if (post(loop, [&] { ran.fetch_add(1); }) != VKP_OK) {
                vkp_test_fail("a post was refused");
            }
            while (ran.load() != i) {
            }
        }
    });
    while (ran.load() != rounds) {
        loop.round(loop.patience());
    }
    other.join();
    CHECK(ran == rounds);
}

TEST_CASE("loop: posts from before the run, and from callbacks")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    std::vector<int> order;
    REQUIRE(post(loop, [&] { order.push_back(1); }) == VKP_OK);
    REQUIRE(post(loop, [&] {
                order.push_back(2);
                if (post(loop, [&] {
                        order.push_back(4);
                        vkp_loop_stop(loop);
                    }) != VKP_OK) {
                    vkp_test_fail("a post was refused");
                }
            }) == VKP_OK);
    REQUIRE(post(loop, [&] { order.push_back(3); }) == VKP_OK);
    CHECK(order.empty());
    CHECK(vkp_loop_run(loop) == VKP_OK);
    CHECK(order == std::vector<int>{1, 2, 3, 4});
}

TEST_CASE("loop: a call that posts itself lets rounds end, and others run")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Pipe pipe;
    Watch watch;
    Timer timer;
    int calls = 0;
    int events = 0;
    int fired = 0;
    int refused = 0;
    std::function<void()> again = [&] {
        calls++;
        if (calls < 100000 && post(loop, again) != VKP_OK) {
            refused++;
        }
    };
    REQUIRE(post(loop, again) == VKP_OK);
    pipe.put();
    REQUIRE(watch.start(loop, pipe.reader(), VKP_IO_READ,
                        [&](uint32_t ready) { events += ready != 0 ? 1 : 0; }) == VKP_OK);
    REQUIRE(timer.start(loop, 0, 1, [&] { fired++; }) == VKP_OK);
    for (int i = 0; i < 5; i++) {
        loop.round(loop.patience());
    }
    CHECK(calls == 5);
    CHECK(events == 5);
    CHECK(fired >= 1);
    // Close runs what was posted, then refuses, so it ends.
    vkp_loop_close(loop);
    CHECK(refused == 1);
    CHECK(calls < 100);
}

TEST_CASE("loop: a post without memory is refused and leaves the loop as it was")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    int ran = 0;
    vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_ONCE, 1);
    CHECK(post(loop, [&] { ran += 100; }) == VKP_ERR_NOMEM);
    CHECK(post(loop, [&] { ran++; }) == VKP_OK);
    loop.round();
    CHECK(ran == 1);
    CHECK(vkp_loop_post(loop, nullptr, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_loop_post(
              nullptr, [](void *) {}, nullptr) == VKP_ERR_INVALID);
}

// ---- timers ----

TEST_CASE("loop: timers fire in the order of their deadlines, equal ones as started")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    const uint64_t start = loop.now();
    std::vector<std::unique_ptr<Timer>> timers;
    std::vector<int> order;
    const std::vector<int> after_ms = {3, 1, 2, 1, 0, 3, 2, 0};
    for (size_t i = 0; i < after_ms.size(); i++) {
        const uint64_t deadline = start + static_cast<uint64_t>(after_ms[i]) * ms;
        timers.push_back(std::make_unique<Timer>());
        REQUIRE(timers.back()->start(loop, deadline, 0, [&, i, deadline] {
            order.push_back(loop.now() >= deadline ? static_cast<int>(i) : -1);
        }) == VKP_OK);
    }
    CHECK(vkp_loop_get_deadline_ns(loop) == start);
    while (order.size() < after_ms.size()) {
        loop.round(loop.patience());
    }
    CHECK(order == std::vector<int>{4, 7, 1, 3, 2, 6, 0, 5});
    CHECK(vkp_loop_get_deadline_ns(loop) == VKP_FOREVER);
}

TEST_CASE("loop: on a virtual clock every timer fires exactly at its deadline")
{
    Loop loop(&vkp_backend_null);
    std::mt19937 random(1);
    constexpr size_t count = 500;
    const uint64_t start = loop.now();
    std::vector<std::unique_ptr<Timer>> timers;
    std::multimap<uint64_t, size_t> expected; // keeps equal keys in order of insertion
    std::vector<std::pair<uint64_t, size_t>> fired;
    std::vector<uint64_t> deadlines(count);
    for (size_t i = 0; i < count; i++) {
        timers.push_back(std::make_unique<Timer>());
        deadlines[i] = start + 1 + random() % 1000;
        REQUIRE(timers[i]->start(loop, deadlines[i], 0,
                                 [&, i] { fired.emplace_back(loop.now(), i); }) == VKP_OK);
    }
    std::vector<bool> started(count, true);
    std::vector<size_t> again;
    for (size_t i = 0; i < count; i++) {
        if (i % 3 == 0) {
            vkp_timer_stop(timers[i].get());
            vkp_timer_stop(timers[i].get());
            started[i] = false;
        } else if (i % 5 == 0) {
            deadlines[i] = start + 1 + random() % 1000;
            REQUIRE(timers[i]->restart(loop, deadlines[i]) == VKP_OK);
            again.push_back(i);
        }
    }
    for (size_t i = 0; i < count; i++) {
        if (started[i] && std::find(again.begin(), again.end(), i) == again.end()) {
            expected.emplace(deadlines[i], i);
        }
    }
    for (size_t i : again) {
        expected.emplace(deadlines[i], i);
    }
    while (vkp_loop_get_deadline_ns(loop) != VKP_FOREVER) {
        loop.round(VKP_FOREVER);
    }
    CHECK(fired == std::vector<std::pair<uint64_t, size_t>>(expected.begin(), expected.end()));
}

TEST_CASE("loop: a timer that is started again moves")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Timer timer;
    Timer other;
    std::string order;
    REQUIRE(timer.start(loop, loop.now() + 1 * ms, 0, [&] { order += 't'; }) == VKP_OK);
    REQUIRE(other.start(loop, loop.now() + 2 * ms, 0, [&] { order += 'o'; }) == VKP_OK);
    REQUIRE(timer.restart(loop, loop.now() + 3 * ms) == VKP_OK);
    while (order.size() < 2) {
        loop.round(loop.patience());
    }
    CHECK(order == "ot");
    REQUIRE(timer.restart(loop, loop.now() + uint64_t(3600) * 1000 * ms) == VKP_OK);
    REQUIRE(timer.restart(loop, loop.now()) == VKP_OK);
    loop.round(loop.patience());
    CHECK(order == "ott");
}

TEST_CASE("loop: periodic timers")
{
    Loop loop(&vkp_backend_null);
    Timer timer;
    std::vector<uint64_t> fired;
    const uint64_t start = loop.now();
    SECTION("keep their rhythm")
    {
        REQUIRE(timer.start(loop, start + 10, 5, [&] { fired.push_back(loop.now() - start); }) ==
                VKP_OK);
        while (fired.size() < 4) {
            loop.round(VKP_FOREVER);
        }
        CHECK(fired == std::vector<uint64_t>{10, 15, 20, 25});
    }
    SECTION("that fell behind fire once and go on from now")
    {
        // Something ready keeps the clock still; the deadline of another wait moves it far.
        REQUIRE(timer.start(loop, start + 10, 5, [&] { fired.push_back(loop.now() - start); }) ==
                VKP_OK);
        vkp_timer_stop(&timer);
        loop.round(start + 1000);
        REQUIRE(loop.now() == start + 1000);
        REQUIRE(timer.restart(loop, start + 10, 5) == VKP_OK);
        for (int i = 0; i < 3; i++) {
            loop.round(VKP_FOREVER);
        }
        CHECK(fired == std::vector<uint64_t>{1000, 1005, 1010});
    }
    SECTION("are stopped from their own callback")
    {
        REQUIRE(timer.start(loop, start + 10, 5, [&] {
            fired.push_back(loop.now() - start);
            if (fired.size() == 2) {
                vkp_timer_stop(&timer);
            }
        }) == VKP_OK);
        while (vkp_loop_get_deadline_ns(loop) != VKP_FOREVER) {
            loop.round(VKP_FOREVER);
        }
        CHECK(fired == std::vector<uint64_t>{10, 15});
    }
    SECTION("become one-shot when started so from their callback")
    {
        REQUIRE(timer.start(loop, start + 10, 5, [&] {
            fired.push_back(loop.now() - start);
            if (fired.size() == 1 && timer.restart(loop, start + 100) != VKP_OK) {
                vkp_test_fail("a timer was refused");
            }
        }) == VKP_OK);
        while (vkp_loop_get_deadline_ns(loop) != VKP_FOREVER) {
            loop.round(VKP_FOREVER);
        }
        CHECK(fired == std::vector<uint64_t>{10, 100});
    }
    SECTION("with an endless period fire once")
    {
        REQUIRE(timer.start(loop, start + 10, VKP_FOREVER,
                            [&] { fired.push_back(loop.now() - start); }) == VKP_OK);
        loop.round(start + 10);
        loop.round(start + 1000);
        loop.round(start + 2000);
        CHECK(fired == std::vector<uint64_t>{10});
    }
}

TEST_CASE("loop: a timer stopped by another's callback does not fire")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Timer first;
    Timer second;
    Timer third;
    int fired = 0;
    REQUIRE(first.start(loop, 1, 0, [&] {
        fired++;
        vkp_timer_stop(&second);
        vkp_timer_stop(&first);
    }) == VKP_OK);
    REQUIRE(second.start(loop, 2, 0, [&] { fired += 100; }) == VKP_OK);
    REQUIRE(third.start(loop, 3, 0, [&] { fired++; }) == VKP_OK);
    loop.round(loop.patience());
    CHECK(fired == 2);
    CHECK(vkp_loop_get_deadline_ns(loop) == VKP_FOREVER);
}

TEST_CASE("loop: a timer that starts itself in the past neither hangs the round nor others")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Timer greedy;
    Timer patient;
    int greedy_fired = 0;
    int patient_fired = 0;
    REQUIRE(greedy.start(loop, 0, 0, [&] {
        greedy_fired++;
        if (greedy_fired < 1000 && greedy.restart(loop, 0) != VKP_OK) {
            vkp_test_fail("a timer was refused");
        }
    }) == VKP_OK);
    REQUIRE(patient.start(loop, 1, 0, [&] { patient_fired++; }) == VKP_OK);
    for (int i = 0; i < 3; i++) {
        loop.round(loop.patience());
    }
    CHECK(greedy_fired == 3);
    CHECK(patient_fired == 1);
}

TEST_CASE("loop: a timer may free itself")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    struct Self : vkp_timer {
        int *fired;
    };
    int fired = 0;
    auto *self = new Self();
    self->fired = &fired;
    REQUIRE(vkp_timer_start(
                self, loop,
                [](vkp_timer *timer) {
                    auto *own = static_cast<Self *>(timer);
                    ++*own->fired;
                    delete own;
                },
                0, 0) == VKP_OK);
    loop.round(loop.patience());
    CHECK(fired == 1);
}

TEST_CASE("loop: timers without memory")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    std::vector<std::unique_ptr<Timer>> timers;
    int fired = 0;
    int refused = 0;
    for (int i = 0; i < 100; i++) {
        timers.push_back(std::make_unique<Timer>());
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_ONCE, 1);
        vkp_status status = timers.back()->start(loop, 1, 0, [&] { fired++; });
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
        if (status != VKP_OK) {
            CHECK(status == VKP_ERR_NOMEM);
            refused++;
            REQUIRE(timers.back()->restart(loop, 1) == VKP_OK);
        }
    }
    CHECK(refused > 0);
    loop.round(loop.patience());
    CHECK(fired == 100);
    CHECK(vkp_timer_start(timers[0].get(), loop, nullptr, 0, 0) == VKP_ERR_INVALID);
    CHECK(vkp_timer_start(
              timers[0].get(), nullptr, [](vkp_timer *) {}, 0, 0) == VKP_ERR_INVALID);
}

// ---- watches ----

TEST_CASE("loop: a watch reports readiness until it is stopped")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    int fds[2];
    vkp_test_socket_pair(fds);
    std::vector<uint32_t> seen;
    Watch watch;
    REQUIRE(watch.start(loop, fds[0], VKP_IO_READ,
                        [&](uint32_t ready) { seen.push_back(ready); }) == VKP_OK);
    loop.round();
    CHECK(seen.empty());
    REQUIRE(write(fds[1], "x", 1) == 1);
    loop.round(loop.patience());
    loop.round(loop.patience());
    CHECK(seen == std::vector<uint32_t>{VKP_IO_READ, VKP_IO_READ});
    REQUIRE(vkp_io_set(&watch, VKP_IO_READ | VKP_IO_WRITE) == VKP_OK);
    loop.round(loop.patience());
    CHECK(seen.back() == (VKP_IO_READ | VKP_IO_WRITE));
    REQUIRE(vkp_io_set(&watch, VKP_IO_WRITE) == VKP_OK);
    loop.round(loop.patience());
    CHECK(seen.back() == VKP_IO_WRITE);
    seen.clear();
    REQUIRE(vkp_io_set(&watch, 0) == VKP_OK);
    loop.round();
    CHECK(seen.empty());
    REQUIRE(vkp_io_set(&watch, VKP_IO_READ) == VKP_OK);
    loop.round(loop.patience());
    CHECK(seen == std::vector<uint32_t>{VKP_IO_READ});
    vkp_io_stop(&watch);
    vkp_io_stop(&watch);
    CHECK(vkp_io_set(&watch, VKP_IO_READ) == VKP_ERR_INVALID);
    loop.round();
    CHECK(seen.size() == 1);
    close(fds[0]);
    close(fds[1]);
}

TEST_CASE("loop: a watch started without interest waits for one")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Pipe pipe;
    Watch watch;
    int seen = 0;
    pipe.put();
    REQUIRE(watch.start(loop, pipe.reader(), 0, [&](uint32_t) { seen++; }) == VKP_OK);
    loop.round();
    CHECK(seen == 0);
    REQUIRE(vkp_io_set(&watch, VKP_IO_READ) == VKP_OK);
    loop.round(loop.patience());
    CHECK(seen == 1);
}

TEST_CASE("loop: a watch stopped by another's callback in the same batch is not called (G8)")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Pipe pipes[2];
    Watch watches[2];
    int calls = 0;
    for (int i = 0; i < 2; i++) {
        pipes[i].put();
        REQUIRE(watches[i].start(loop, pipes[i].reader(), VKP_IO_READ, [&, i](uint32_t) {
            calls++;
            vkp_io_stop(&watches[1 - i]);
        }) == VKP_OK);
    }
    loop.round(loop.patience());
    CHECK(calls == 1);
    loop.round(loop.patience());
    CHECK(calls == 2);
}

TEST_CASE("loop: a descriptor used again within a batch gets no event of its former owner (G8)")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    std::unique_ptr<Pipe> pipes[2] = {std::make_unique<Pipe>(), std::make_unique<Pipe>()};
    Watch watches[2];
    Pipe fresh;
    Watch fresh_watch;
    int calls = 0;
    int fresh_calls = 0;
    for (int i = 0; i < 2; i++) {
        pipes[i]->put();
        REQUIRE(watches[i].start(loop, pipes[i]->reader(), VKP_IO_READ, [&, i](uint32_t) {
            calls++;
            vkp_io_stop(&watches[i]);
            vkp_io_stop(&watches[1 - i]);
            const int number = pipes[1 - i]->reader();
            pipes[1 - i]->close_reader();
            fresh.move_reader(number);
            if (fresh_watch.start(loop, number, VKP_IO_READ, [&](uint32_t) { fresh_calls++; }) !=
                VKP_OK) {
                vkp_test_fail("a watch was refused");
            }
        }) == VKP_OK);
    }
    loop.round(loop.patience());
    CHECK(calls == 1);
    CHECK(fresh_calls == 0);
    loop.round();
    CHECK(fresh_calls == 0);
    fresh.put();
    loop.round(loop.patience());
    CHECK(calls == 1);
    CHECK(fresh_calls == 1);
}

TEST_CASE("loop: a watch stopped and started again in its callback goes on")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Pipe pipe;
    Watch watch;
    int calls = 0;
    std::function<void(uint32_t)> again = [&](uint32_t) {
        calls++;
        vkp_io_stop(&watch);
        if (watch.start(loop, pipe.reader(), VKP_IO_READ, std::function<void(uint32_t)>(again)) !=
            VKP_OK) {
            vkp_test_fail("a watch was refused");
        }
    };
    pipe.put();
    REQUIRE(watch.start(loop, pipe.reader(), VKP_IO_READ, again) == VKP_OK);
    for (int i = 1; i <= 3; i++) {
        loop.round(loop.patience());
        CHECK(calls == i);
    }
}

TEST_CASE("loop: many watches started inside a callback")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Pipe pipe;
    Watch first;
    std::vector<int> fds;
    std::vector<std::unique_ptr<Watch>> watches;
    int calls = 0;
    pipe.put();
    REQUIRE(first.start(loop, pipe.reader(), VKP_IO_READ, [&](uint32_t) {
        if (!watches.empty()) {
            return;
        }
        for (int i = 0; i < crowd; i++) {
            fds.push_back(dup(pipe.reader()));
            watches.push_back(std::make_unique<Watch>());
            if (watches.back()->start(loop, fds.back(), VKP_IO_READ, [&](uint32_t) { calls++; }) !=
                VKP_OK) {
                vkp_test_fail("a watch was refused");
            }
        }
    }) == VKP_OK);
    loop.round(loop.patience());
    CHECK(calls == 0);
    loop.round(loop.patience());
    CHECK(calls == crowd);
    watches.clear();
    for (int fd : fds) {
        close(fd);
    }
}

TEST_CASE("loop: watches that are refused")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Pipe pipe;
    Watch watch;
    const auto fn = [](vkp_io *, uint32_t) {};
    CHECK(vkp_io_start(&watch, nullptr, pipe.reader(), VKP_IO_READ, fn) == VKP_ERR_INVALID);
    CHECK(vkp_io_start(nullptr, loop, pipe.reader(), VKP_IO_READ, fn) == VKP_ERR_INVALID);
    CHECK(vkp_io_start(&watch, loop, -1, VKP_IO_READ, fn) == VKP_ERR_INVALID);
    CHECK(vkp_io_start(&watch, loop, pipe.reader(), VKP_IO_READ, nullptr) == VKP_ERR_INVALID);
    std::vector<int> fds;
    std::vector<std::unique_ptr<Watch>> watches;
    int refused = 0;
    int calls = 0;
    for (int i = 0; i < crowd; i++) {
        fds.push_back(dup(pipe.reader()));
        watches.push_back(std::make_unique<Watch>());
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_ONCE, 1);
        vkp_status status;
        while ((status = watches.back()->start(loop, fds.back(), VKP_IO_READ,
                                               [&](uint32_t) { calls++; })) != VKP_OK) {
            CHECK(status == VKP_ERR_NOMEM);
            refused++;
        }
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
    }
    CHECK(refused > 0);
    pipe.put();
    loop.round(loop.patience());
    CHECK(calls == crowd);
    watches.clear();
    for (int fd : fds) {
        close(fd);
    }
    vkp_loop_close(loop);
    CHECK(vkp_io_start(&watch, loop, pipe.reader(), VKP_IO_READ, fn) == VKP_ERR_INVALID);
}

TEST_CASE("loop: a deadline by the loop's own clock, where time is virtual")
{
    Loop loop(&vkp_backend_null);
    const uint64_t start = vkp_loop_get_now_ns(loop);
    uint64_t fired = 0;
    Timer timer;
    const uint64_t hour_ms = 3600 * 1000;
    CHECK(vkp_loop_after_ms(loop, 0) == start);
    CHECK(vkp_loop_after_ms(loop, UINT64_MAX) == VKP_FOREVER);
    REQUIRE(timer.start(loop, vkp_loop_after_ms(loop, hour_ms), 0,
                        [&] { fired = vkp_loop_get_now_ns(loop); }) == VKP_OK);
    loop.round(VKP_FOREVER);
    CHECK(fired == start + hour_ms * 1000000);
}

// ---- handlers of channels ----

namespace {

struct Channel {
    vkp_mpsc_tx *tx = nullptr;
    vkp_mpsc_rx *rx = nullptr;
    vkp_handler *handler = nullptr;
    explicit Channel(const vkp_env *env, size_t capacity = 0)
    {
        vkp_mpsc_config config = {};
        config.elem_bytes = sizeof(int);
        config.capacity_items = capacity;
        config.env = env;
        if (vkp_mpsc_open(&config, &tx, &rx) != VKP_OK) {
            vkp_test_fail("no channel");
        }
    }
    ~Channel()
    {
        forget();
        vkp_mpsc_tx_unref(tx);
        vkp_mpsc_rx_unref(rx);
    }
    Channel(const Channel &) = delete;
    Channel &operator=(const Channel &) = delete;
    vkp_status handle(vkp_loop *loop, std::function<void()> *fn)
    {
        return vkp_test_handle(
            loop, rx, [](void *user) { (*static_cast<std::function<void()> *>(user))(); }, fn,
            &handler);
    }
    void forget()
    {
        vkp_handler_unref(std::exchange(handler, nullptr));
    }
    void send(int value)
    {
        if (vkp_mpsc_try_send(tx, &value) != VKP_OK) {
            vkp_test_fail("a value was refused");
        }
    }
};

} // namespace

TEST_CASE("loop: a handler of a channel gets what many threads send")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Channel channel(&loop.test.env, 16);
    constexpr int threads = 3;
    constexpr int each = 2000;
    int received = 0;
    bool closed = false;
    std::vector<int> next(threads, 0);
    int out_of_order = 0;
    std::function<void()> fn = [&] {
        int value = 0;
        vkp_status status = vkp_mpsc_try_recv(channel.rx, &value);
        if (status == VKP_OK) {
            const size_t thread = static_cast<size_t>(value / each);
            out_of_order += value % each != next[thread] ? 1 : 0;
            next[thread]++;
            received++;
        } else {
            closed = status == VKP_ERR_CLOSED;
            vkp_handler_close(channel.handler);
            vkp_loop_stop(loop);
        }
    };
    REQUIRE(channel.handle(loop, &fn) == VKP_OK);
    std::vector<std::thread> senders;
    std::atomic<int> refused{0};
    for (int t = 0; t < threads; t++) {
        vkp_mpsc_tx *tx = vkp_mpsc_tx_ref(channel.tx);
        senders.emplace_back([&refused, t, tx] {
            for (int i = 0; i < each; i++) {
                int value = t * each + i;
                refused.fetch_add(vkp_mpsc_send(tx, &value, VKP_FOREVER) == VKP_OK ? 0 : 1);
            }
            vkp_mpsc_tx_unref(tx);
        });
    }
    vkp_mpsc_tx_unref(std::exchange(channel.tx, nullptr));
    CHECK(vkp_loop_run(loop) == VKP_OK);
    for (std::thread &sender : senders) {
        sender.join();
    }
    CHECK(refused == 0);
    CHECK(out_of_order == 0);
    CHECK(received == threads * each);
    CHECK(closed);
}

TEST_CASE("loop: a handler of a channel is called as long as something is there")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Channel channel(&loop.test.env);
    int calls = 0;
    std::function<void()> fn = [&] { calls++; };
    channel.send(1);
    REQUIRE(channel.handle(loop, &fn) == VKP_OK);
    for (int i = 0; i < 3; i++) {
        loop.round(loop.patience());
    }
    CHECK(calls == 3);
    int value = 0;
    REQUIRE(vkp_mpsc_try_recv(channel.rx, &value) == VKP_OK);
    fn = [&] { calls += 100; };
    SECTION("and is silent while it is empty")
    {
        fn = [&] {
            int got = 0;
            if (vkp_mpsc_try_recv(channel.rx, &got) == VKP_OK) {
                calls += 10;
            }
        };
        loop.round();
        loop.round();
        CHECK(calls == 3);
        channel.send(2);
        loop.round(loop.patience());
        loop.round();
        CHECK(calls == 13);
    }
    SECTION("and never after a close")
    {
        vkp_handler_close(channel.handler);
        vkp_handler_close(channel.handler);
        channel.send(2);
        loop.round();
        loop.round();
        CHECK(calls == 3);
        channel.forget();
        CHECK(channel.handle(loop, &fn) == VKP_OK);
        loop.round(loop.patience());
        CHECK(calls == 103);
    }
    channel.forget();
    loop.round();
}

// ---- close ----

TEST_CASE("loop: close tells each watch once, with nothing ready, and stops it")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Pipe pipes[3];
    Watch watches[3];
    std::vector<uint32_t> seen[3];
    for (int i = 0; i < 3; i++) {
        pipes[i].put();
    }
    REQUIRE(watches[0].start(loop, pipes[0].reader(), VKP_IO_READ, [&](uint32_t ready) {
        seen[0].push_back(ready);
        vkp_io_stop(&watches[0]); // stopped already
        vkp_io_stop(&watches[1]);
    }) == VKP_OK);
    REQUIRE(watches[1].start(loop, pipes[1].reader(), VKP_IO_READ,
                             [&](uint32_t ready) { seen[1].push_back(ready); }) == VKP_OK);
    REQUIRE(watches[2].start(loop, pipes[2].reader(), VKP_IO_READ,
                             [&](uint32_t ready) { seen[2].push_back(ready); }) == VKP_OK);
    vkp_loop_close(loop);
    CHECK(seen[0] == std::vector<uint32_t>{0});
    CHECK(seen[1].empty());
    CHECK(seen[2] == std::vector<uint32_t>{0});
    CHECK(vkp_io_set(&watches[2], VKP_IO_WRITE) == VKP_ERR_INVALID);
}

TEST_CASE("loop: close runs what was posted, and no timer")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Timer timer;
    Channel channel(&loop.test.env);
    int ran = 0;
    int fired = 0;
    int late = 0;
    std::function<void()> fn = [&] { late++; };
    REQUIRE(timer.start(loop, 0, 0, [&] { fired++; }) == VKP_OK);
    REQUIRE(channel.handle(loop, &fn) == VKP_OK);
    REQUIRE(post(loop, [&] {
                ran++;
                if (post(loop, [&] { ran += 10; }) != VKP_OK) {
                    ran += 100;
                }
            }) == VKP_OK);
    vkp_loop_close(loop);
    CHECK((ran == 11 || ran == 101)); // run, or refused: not lost
    CHECK(fired == 0);
    channel.send(1);
    CHECK(late == 0);
    int value = 0;
    CHECK(vkp_mpsc_try_recv(channel.rx, &value) == VKP_OK);
    CHECK(post(loop, [] {}) == VKP_ERR_CLOSED);
    vkp_timer_stop(&timer);
}

TEST_CASE("loop: timers and watches may be stopped when their loop is gone")
{
    ON_EVERY_BACKEND;
    Pipe pipe;
    Timer timers[3];
    Watch watch;
    int calls = 0;
    {
        Loop loop(backend);
        for (uint64_t i = 0; i < 3; i++) {
            REQUIRE(timers[i].start(loop, i, 1, [&] { calls++; }) == VKP_OK);
        }
        REQUIRE(watch.start(loop, pipe.reader(), VKP_IO_READ,
                            [&](uint32_t ready) { calls += ready != 0 ? 1 : 0; }) == VKP_OK);
    }
    for (Timer &timer : timers) {
        vkp_timer_stop(&timer);
    }
    vkp_io_stop(&watch);
    CHECK(calls == 0);
    Loop next(backend);
    REQUIRE(timers[0].restart(next, 0) == VKP_OK);
    next.round();
    CHECK(calls == 1);
}

TEST_CASE("loop: posts that race a close are run or refused, never lost")
{
    ON_EVERY_BACKEND;
    for (int repeat = 0; repeat < 20; repeat++) {
        Loop loop(backend);
        std::atomic<int> ran{0};
        std::atomic<int> taken{0};
        std::atomic<int> started{0};
        std::vector<std::thread> posters;
        for (int t = 0; t < 2; t++) {
            vkp_loop *mine = vkp_loop_ref(loop);
            posters.emplace_back([&, mine] {
                started.fetch_add(1);
                for (;;) {
                    vkp_status status = post(mine, [&] { ran.fetch_add(1); });
                    if (status != VKP_OK) {
                        break;
                    }
                    taken.fetch_add(1);
                    if (taken.load() > 100000) {
                        break;
                    }
                }
                vkp_loop_unref(mine);
            });
        }
        while (started.load() != 2) {
            loop.round();
        }
        vkp_loop_close(loop);
        for (std::thread &poster : posters) {
            poster.join();
        }
        REQUIRE(ran == taken);
    }
}

// ---- in a foreign loop, and in a forked child ----

TEST_CASE("loop: a foreign loop needs the descriptor and the deadline only")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    const int fd = vkp_loop_get_fd(loop);
    if (fd < 0) {
        CHECK(fd == -1);
        return;
    }
    Pipe pipe;
    Watch watch;
    Timer timer;
    int events = 0;
    int posts = 0;
    REQUIRE(watch.start(loop, pipe.reader(), VKP_IO_READ, [&](uint32_t) {
        events++;
        pipe.take();
    }) == VKP_OK);
    const auto readable = [&](int timeout_ms) {
        pollfd entry = {fd, POLLIN, 0};
        return poll(&entry, 1, timeout_ms) == 1;
    };
    CHECK(vkp_loop_get_deadline_ns(loop) == VKP_FOREVER);
    CHECK_FALSE(readable(0));
    pipe.put();
    CHECK(readable(-1));
    loop.round();
    CHECK(events == 1);
    CHECK_FALSE(readable(0));
    std::thread other([&] {
        if (post(loop, [&] { posts++; }) != VKP_OK) {
            vkp_test_fail("a post was refused");
        }
    });
    CHECK(readable(-1));
    loop.round();
    other.join();
    CHECK(posts == 1);
    REQUIRE(post(loop, [&] { posts++; }) == VKP_OK);
    CHECK(vkp_loop_get_deadline_ns(loop) == 0);
    loop.round();
    CHECK(posts == 2);
    const uint64_t deadline = loop.now() + uint64_t(3600) * 1000 * ms;
    REQUIRE(timer.start(loop, deadline, 0, [] {}) == VKP_OK);
    CHECK(vkp_loop_get_deadline_ns(loop) == deadline);
}

TEST_CASE("loop: a forked child gives its reference back without touching the parent's")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Pipe pipe;
    Watch watch;
    int events = 0;
    REQUIRE(watch.start(loop, pipe.reader(), VKP_IO_READ,
                        [&](uint32_t ready) { events += ready != 0 ? 1 : 0; }) == VKP_OK);
    pid_t pid = fork();
    if (pid == 0) {
        vkp_loop_unref(loop);
        _exit(0);
    }
    REQUIRE(pid > 0);
    int status = -1;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
    CHECK(status == 0);
    pipe.put();
    loop.round(loop.patience());
    CHECK(events == 1);
    REQUIRE(post(loop, [&] { events += 10; }) == VKP_OK);
    loop.round(loop.patience());
    CHECK(events == 12); // the watch is still ready
}
