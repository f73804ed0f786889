// SPDX-License-Identifier: MIT
//
// Loops that are guests in the loop of another library, as programs have them: beside watchers and
// timers of the program's own, several in one loop, with clients, listeners and connections on
// them, closed in every order. Linked with one library at a time (support/foreign/foreign.h); the
// guest in it also passes what every backend must: backend_conformance.cpp, test_loop.cpp.
#include "support/catch.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "support/foreign/foreign.h"
#include "support/support.h"

namespace {

constexpr uint64_t ms = 1000000;

const vkp_test_foreign &foreign()
{
    return *vkp_test_foreign_loop();
}

// The program's own loop, which ends the test when it is silent for too long.
class Program {
  public:
    Program()
    {
        vkp_test_backends(); // what the library opens for good, it has opened now
        fds_before_ = vkp_test_fd_count();
        loop_ = foreign().open();
    }
    ~Program()
    {
        close();
    }
    Program(const Program &) = delete;
    Program &operator=(const Program &) = delete;
    operator void *() const
    {
        return loop_;
    }
    void close()
    {
        if (loop_ != nullptr) {
            foreign().close(std::exchange(loop_, nullptr));
        }
    }
    int fds_more() const
    {
        return vkp_test_fd_count() - fds_before_;
    }
    void step(bool wait = false)
    {
        foreign().step(loop_, wait);
    }
    void run()
    {
        foreign().run(loop_);
    }
    void stop()
    {
        foreign().stop(loop_);
    }

    template <typename Done>
    void until(const char *what, Done done)
    {
        void *patience = foreign().timer_start(
            loop_, (vkp_test_deadline() - vkp_now_ns()) / ms,
            [](void *user) { vkp_test_fail("no %s", static_cast<const char *>(user)); },
            const_cast<char *>(what));
        while (!done()) {
            step(true);
        }
        foreign().timer_end(patience);
    }

  private:
    void *loop_ = nullptr;
    int fds_before_ = 0;
};

// A loop of ours as a guest in it, which gives back everything by the next iteration.
class Guest {
  public:
    explicit Guest(Program &program) : program_(program)
    {
        vkp_test_env_init(&test);
        sys = *vkp_sys_get_default();
        test.env.sys = &sys;
        vkp_loop_config config = {};
        config.backend = foreign().guest;
        config.env = &test.env;
        config.foreign = program;
        if (vkp_loop_open(&config, &loop_) != VKP_OK) {
            vkp_test_fail("no guest");
        }
    }
    ~Guest()
    {
        close();
        program_.step();
        vkp_test_env_deinit(&test);
    }
    Guest(const Guest &) = delete;
    Guest &operator=(const Guest &) = delete;
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

    vkp_test_env test;
    vkp_sys sys; // members may be replaced

  private:
    Program &program_;
    vkp_loop *loop_ = nullptr;
};

// The program's own timer and descriptor.
struct OwnTimer {
    std::function<void()> fn;
    void *timer;
    OwnTimer(Program &program, uint64_t after_ms, std::function<void()> what) : fn(std::move(what))
    {
        timer = foreign().timer_start(
            program, after_ms, [](void *user) { static_cast<OwnTimer *>(user)->fn(); }, this);
    }
    ~OwnTimer()
    {
        foreign().timer_end(timer);
    }
    OwnTimer(const OwnTimer &) = delete;
    OwnTimer &operator=(const OwnTimer &) = delete;
};

struct OwnWatch {
    std::function<void()> fn;
    void *watch;
    OwnWatch(Program &program, int fd, std::function<void()> what) : fn(std::move(what))
    {
        watch = foreign().watch_start(
            program, fd, [](void *user) { static_cast<OwnWatch *>(user)->fn(); }, this);
    }
    ~OwnWatch()
    {
        foreign().watch_end(watch);
    }
    OwnWatch(const OwnWatch &) = delete;
    OwnWatch &operator=(const OwnWatch &) = delete;
};

void post(vkp_loop *loop, std::function<void()> what)
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
        vkp_test_fail("a post was refused");
    }
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
    void start(vkp_loop *loop, uint64_t after_ns, std::function<void()> what)
    {
        fn = std::move(what);
        if (vkp_timer_start(
                this, loop, [](vkp_timer *timer) { static_cast<Timer *>(timer)->fn(); }, 0,
                vkp_now_ns() + after_ns) != VKP_OK) {
            vkp_test_fail("a timer was refused");
        }
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
    vkp_status try_start(vkp_loop *loop, int fd, std::function<void(uint32_t)> what)
    {
        fn = std::move(what);
        return vkp_io_start(this, loop, fd, VKP_IO_READ, [](vkp_io *watch, uint32_t ready) {
            static_cast<Watch *>(watch)->fn(ready);
        });
    }
    void start(vkp_loop *loop, int fd, std::function<void(uint32_t)> what)
    {
        if (try_start(loop, fd, std::move(what)) != VKP_OK) {
            vkp_test_fail("a watch was refused");
        }
    }
};

struct Pipe {
    int fds[2];
    Pipe()
    {
        if (pipe(fds) != 0) {
            vkp_test_fail("no pipe: %s", strerror(errno));
        }
    }
    ~Pipe()
    {
        close(fds[0]);
        close(fds[1]);
    }
    Pipe(const Pipe &) = delete;
    Pipe &operator=(const Pipe &) = delete;
    int reader() const
    {
        return fds[0];
    }
    void put() const
    {
        if (write(fds[1], "x", 1) != 1) {
            vkp_test_fail("a write to a pipe failed");
        }
    }
    void take() const
    {
        char byte;
        if (read(fds[0], &byte, 1) != 1) {
            vkp_test_fail("a read from a pipe failed");
        }
    }
};

} // namespace

// ---- open, close ----

TEST_CASE("guest: the struct is complete, and the loop is not ours to run")
{
    const vkp_backend *backend = foreign().guest;
    CHECK(backend->abi == VKP_BACKEND_ABI);
    CHECK(backend->flags == VKP_BACKEND_GUEST);
    CHECK(std::string(backend->name).substr(0, 3) == "lib");
    CHECK(backend->timer != nullptr);
    CHECK(backend->clock_ns == nullptr);
    Program program;
    Guest guest(program);
    CHECK(vkp_loop_run(guest) == VKP_ERR_INVALID);
    CHECK(vkp_loop_get_fd(guest) == -1);
    vkp_loop_config config = {};
    config.backend = backend;
    vkp_loop *loop = nullptr;
    CHECK(vkp_loop_open(&config, &loop) == VKP_ERR_INVALID); // in which loop?
}

TEST_CASE("guest: an open that fails leaves nothing in the foreign loop")
{
    Program program;
    const int fds = vkp_test_fd_count();
    vkp_test_env test;
    vkp_test_env_init(&test);
    vkp_loop_config config = {};
    config.backend = foreign().guest;
    config.env = &test.env;
    config.foreign = program;
    uint64_t k = 1;
    for (vkp_loop *loop = nullptr; loop == nullptr; k++) {
        vkp_test_env_fault(&test, VKP_TEST_FAULT_ONCE, k);
        if (vkp_loop_open(&config, &loop) == VKP_OK) {
            vkp_loop_unref(loop);
        } else {
            CHECK(vkp_test_env_live_blocks(&test) == 0);
            CHECK(vkp_test_fd_count() == fds);
        }
    }
    vkp_test_env_fault(&test, VKP_TEST_FAULT_NONE, 0);
    CHECK(k > 4); // the loop, its events and the guest's state at least
    program.step();
    CHECK(vkp_test_env_live_blocks(&test) == 0);
    vkp_test_env_deinit(&test);
    program.close();
    CHECK(program.fds_more() == 0);
}

TEST_CASE("guest: a loop ends in every order, and the program's own goes on")
{
    Program program;
    Pipe pipe;
    auto guest = std::make_unique<Guest>(program);
    auto timer = std::make_unique<Timer>();
    auto watch = std::make_unique<Watch>();
    int calls = 0;
    const auto busy = [&] {
        pipe.put();
        watch->start(*guest, pipe.reader(), [&](uint32_t ready) { calls += ready != 0 ? 1 : 0; });
        timer->start(*guest, 0, [&] { calls++; });
        post(*guest, [&] { calls++; });
    };
    SECTION("before it ever ran")
    {
        guest.reset();
    }
    SECTION("before it ever ran, with work waiting")
    {
        busy();
        guest->close(); // runs what was posted
        CHECK(calls == 1);
    }
    SECTION("between two iterations")
    {
        busy();
        program.until("calls", [&] { return calls >= 3; });
        guest->close();
    }
    SECTION("by a callback of the program's, in the batch that has news for us as well")
    {
        Pipe before;
        Pipe after;
        int own_calls = 0;
        const auto close_second = [&] {
            if (++own_calls == 2) { // ours was between them, in either direction
                guest->close();
            }
        };
        OwnWatch first(program, before.reader(), [&] {
            before.take();
            close_second();
        });
        OwnWatch second(program, after.reader(), [&] {
            after.take();
            close_second();
        });
        watch->start(*guest, pipe.reader(), [&](uint32_t ready) { calls += ready != 0 ? 1 : 0; });
        program.step();
        before.put();
        pipe.put();
        after.put();
        program.until("close", [&] { return own_calls == 2; });
        CHECK(calls == 0); // its round was due, and did not come
    }
    SECTION("first closed, later given back")
    {
        busy();
        program.step();
        vkp_loop_close(*guest);
        const int before = calls;
        for (int i = 0; i < 3; i++) {
            program.step();
        }
        CHECK(calls == before);
        program.run(); // nothing keeps it alive
    }
    SECTION("kept by a reference, given back last")
    {
        busy();
        vkp_loop *last = vkp_loop_ref(*guest);
        guest->close();
        program.step();
        vkp_loop_unref(last);
    }
    watch.reset();
    timer.reset();
    bool on_time = false;
    OwnTimer own(program, 1, [&] { on_time = true; });
    program.run();
    CHECK(on_time);
    guest.reset();
    program.run();
}

// ---- beside the program's own ----

TEST_CASE("guest: descriptors, timers and posts beside the program's own")
{
    Program program;
    Guest guest(program);
    Pipe ours;
    Pipe theirs;
    Watch watch;
    Timer timer;
    std::string heard;
    watch.start(guest, ours.reader(), [&](uint32_t ready) {
        CHECK(ready == VKP_IO_READ);
        ours.take();
        heard += 'o';
    });
    OwnWatch own_watch(program, theirs.reader(), [&] {
        theirs.take();
        heard += 't';
        ours.put();
    });
    const uint64_t start = vkp_now_ns();
    timer.start(guest, 3 * ms, [&] {
        CHECK(vkp_now_ns() >= start + 3 * ms);
        heard += 'T';
        theirs.put();
    });
    post(guest, [&] { heard += 'p'; });
    program.until("descriptor of ours", [&] { return heard.size() == 4; });
    CHECK(heard == "pTto");
}

TEST_CASE("guest: a timer started late in an iteration, when the foreign loop's clock is old")
{
    Program program;
    Guest guest(program);
    Timer timer;
    bool fired = false;
    OwnTimer own(program, 0, [&] {
        const uint64_t begin = vkp_now_ns();
        while (vkp_now_ns() < begin + 5 * ms) { // so much too early the foreign timer will be
        }
        timer.start(guest, 2 * ms, [&] { fired = true; });
    });
    program.run();
    CHECK(fired);
}

TEST_CASE("guest: neither a busy guest nor a busy program starves the other")
{
    Program program;
    Guest guest(program);
    Pipe ours;
    Pipe theirs;
    Watch watch;
    int our_calls = 0;
    int their_calls = 0;
    OwnWatch own(program, theirs.reader(), [&] { their_calls++; });
    theirs.put(); // and never taken: ready in each iteration
    SECTION("descriptors")
    {
        ours.put();
        watch.start(guest, ours.reader(), [&](uint32_t) { our_calls++; });
        for (int i = 0; i < 50; i++) {
            program.step(true);
        }
        CHECK(our_calls >= 45);
    }
    SECTION("a call that posts itself, and a timer that starts itself in the past")
    {
        Timer timer;
        std::function<void()> again = [&] {
            our_calls++;
            post(guest, again);
        };
        std::function<void()> past = [&] {
            our_calls++;
            timer.start(guest, 0, past);
        };
        post(guest, again);
        timer.start(guest, 0, past);
        for (int i = 0; i < 50; i++) {
            program.step(true);
        }
        CHECK(our_calls >= 90);
        CHECK(our_calls <= 110);
        again = [] {};
        past = [] {};
        program.step(true);
        program.step(true);
    }
    CHECK(their_calls >= 45);
}

namespace {
std::atomic<int> polls{0};
std::atomic<int> sends{0};
} // namespace

TEST_CASE("guest: one round for a batch: descriptors are asked for at once, writes leave together")
{
    Program program;
    Guest guest(program);
    guest.sys.poll = [](void *fds, size_t count, uint64_t deadline_ns) {
        polls++;
        return vkp_sys_get_default()->poll(fds, count, deadline_ns);
    };
    guest.sys.send = [](int fd, const vkp_range *ranges, size_t count) {
        sends++;
        return vkp_sys_get_default()->send(fd, ranges, count);
    };
    program.step(); // the first round
    constexpr int count = 20;
    int fds[2];
    vkp_test_socket_pair(fds);
    vkp_conn_ops ops = {};
    vkp_conn_config config = {};
    config.ops = &ops;
    vkp_conn *conn = nullptr;
    REQUIRE(vkp_conn_open(guest, fds[0], &config, &conn) == VKP_OK);
    vkp_bytes frame;
    REQUIRE(vkp_bytes_copy(&guest.test.env, "x", 1, &frame) == VKP_OK);
    std::vector<std::unique_ptr<Pipe>> pipes;
    std::vector<std::unique_ptr<Watch>> watches;
    int calls = 0;
    for (int i = 0; i < count; i++) {
        pipes.push_back(std::make_unique<Pipe>());
        watches.push_back(std::make_unique<Watch>());
        watches.back()->start(guest, pipes.back()->reader(), [&, i](uint32_t) {
            pipes[static_cast<size_t>(i)]->take();
            calls++;
            if (vkp_conn_push(conn, &frame, 0) != VKP_OK) {
                vkp_test_fail("a push was refused");
            }
        });
    }
    program.step();
    for (const auto &pipe : pipes) {
        pipe->put();
    }
    polls = 0;
    sends = 0;
    program.step(true);
    CHECK(calls == count);
    CHECK(polls == 1);
    CHECK(sends == 1);
    char text[64];
    CHECK(read(fds[1], text, sizeof text) == count);
    // What the program writes outside of rounds leaves together as well.
    for (int i = 0; i < count; i++) {
        REQUIRE(vkp_conn_push(conn, &frame, 0) == VKP_OK);
    }
    program.until("send", [&] { return sends == 2; });
    program.step();
    CHECK(sends == 2);
    CHECK(read(fds[1], text, sizeof text) == count);
    vkp_bytes_unref(&frame);
    watches.clear();
    vkp_conn_close(conn);
    vkp_conn_unref(conn);
    close(fds[1]);
}

TEST_CASE("guest: more than fits a round comes in the next ones")
{
    Program program;
    vkp_test_env test;
    vkp_test_env_init(&test);
    vkp_loop_config config = {};
    config.backend = foreign().guest;
    config.env = &test.env;
    config.foreign = program;
    config.events_per_wait = 7;
    vkp_loop *loop = nullptr;
    REQUIRE(vkp_loop_open(&config, &loop) == VKP_OK);
    Pipe pipe;
    pipe.put();
    std::vector<int> fds;
    std::vector<std::unique_ptr<Watch>> watches;
    std::vector<int> calls(25);
    for (size_t i = 0; i < calls.size(); i++) { // all stay ready
        fds.push_back(dup(pipe.reader()));
        watches.push_back(std::make_unique<Watch>());
        watches.back()->start(loop, fds.back(), [&, i](uint32_t) { calls[i]++; });
    }
    for (int i = 0; i < 50; i++) {
        program.step(true);
    }
    // Whoever is left over goes first in the next round: at the latest it is the fourth.
    CHECK(*std::min_element(calls.begin(), calls.end()) >= 12);
    watches.clear();
    vkp_loop_unref(loop);
    program.step();
    vkp_test_env_deinit(&test);
    for (int fd : fds) {
        close(fd);
    }
}

TEST_CASE("guest: a descriptor that the program watches, too")
{
    Program program;
    Guest guest(program);
    Pipe pipe;
    Watch watch;
    int our_calls = 0;
    int their_calls = 0;
    OwnWatch own(program, pipe.reader(), [&] { their_calls++; });
    errno = 0;
    const vkp_status status = watch.try_start(guest, pipe.reader(), [&](uint32_t) { our_calls++; });
    if (!foreign().shares_numbers) {
        CHECK(status == VKP_ERR_SYS);
        CHECK(errno == EEXIST);
        return;
    }
    REQUIRE(status == VKP_OK);
    pipe.put();
    program.until("calls", [&] { return our_calls > 0 && their_calls > 0; });
    vkp_io_stop(&watch);
    const int before = their_calls;
    program.step(true);
    CHECK(their_calls == before + 1);
}

TEST_CASE("guest: a descriptor in error is reported until its watch ends")
{
    Program program;
    Guest guest(program);
    int fds[2];
    REQUIRE(pipe(fds) == 0);
    struct Writer : vkp_io {
        std::vector<uint32_t> seen;
    } writer;
    static_cast<vkp_io &>(writer) = vkp_io();
    REQUIRE(vkp_io_start(&writer, guest, fds[1], VKP_IO_WRITE, [](vkp_io *watch, uint32_t ready) {
                static_cast<Writer *>(watch)->seen.push_back(ready);
            }) == VKP_OK);
    program.step();
    program.step();
    close(fds[0]); // poll says ERR from now on
    writer.seen.clear();
    program.until("errors", [&] { return writer.seen.size() >= 5; });
    for (const uint32_t ready : writer.seen) {
        CHECK((ready & (VKP_IO_ERROR | VKP_IO_HUP)) != 0);
    }
    vkp_io_stop(&writer);
    const size_t before = writer.seen.size();
    program.step();
    program.step();
    CHECK(writer.seen.size() == before);
    close(fds[1]);
}

TEST_CASE("guest: a round is never run inside one")
{
    if (!foreign().is_recursive) {
        return; // its loop refuses to be run by a callback, or must not be
    }
    Program program;
    Guest guest(program);
    Pipe pipe;
    Watch watch;
    Timer timer;
    int depth = 0;
    int deepest = 0;
    int calls = 0;
    bool timed = false;
    int posted = 0;
    pipe.put();
    watch.start(guest, pipe.reader(), [&](uint32_t) {
        depth++;
        deepest = std::max(deepest, depth);
        if (++calls == 1) {
            timer.start(guest, 0, [&] { timed = true; });
            std::thread([&] { post(guest, [&] { posted++; }); }).join();
            for (int i = 0; i < 5; i++) {
                program.step(); // takes the wake, the descriptor and the timer
            }
            CHECK_FALSE(timed);
            CHECK(posted == 0);
        }
        depth--;
    });
    program.until("calls", [&] { return calls >= 3 && timed && posted == 1; });
    CHECK(deepest == 1);
}

// ---- several guests ----

TEST_CASE("guest: several loops in one foreign loop, closed in any order")
{
    const std::array<size_t, 3> order =
        GENERATE(std::array<size_t, 3>{0, 1, 2}, std::array<size_t, 3>{2, 1, 0},
                 std::array<size_t, 3>{1, 2, 0});
    Program program;
    std::vector<std::unique_ptr<Guest>> guests;
    Pipe pipes[3];
    Watch watches[3];
    Timer timers[3];
    std::array<int, 3> hops = {};
    std::array<int, 3> ticks = {};
    for (size_t i = 0; i < 3; i++) {
        guests.push_back(std::make_unique<Guest>(program));
    }
    // A byte goes round, each loop passes it on to the next; and each has a timer.
    std::function<void(size_t)> tick = [&](size_t i) {
        ticks[i]++;
        timers[i].start(*guests[i], (i + 1) * ms / 4, [&tick, i] { tick(i); });
    };
    for (size_t i = 0; i < 3; i++) {
        watches[i].start(*guests[i], pipes[i].reader(), [&, i](uint32_t ready) {
            if (ready != 0) {
                pipes[i].take();
                hops[i]++;
                post(*guests[(i + 1) % 3], [&, i] { pipes[(i + 1) % 3].put(); });
            }
        });
        tick(i);
    }
    pipes[0].put();
    program.until("hops and ticks", [&] {
        return *std::min_element(hops.begin(), hops.end()) >= 50 &&
               *std::min_element(ticks.begin(), ticks.end()) >= 5;
    });
    CHECK(std::abs(hops[0] - hops[2]) <= 1);
    for (size_t i : order) { // the others' byte stops there, their timers do not
        vkp_timer_stop(&timers[i]);
        vkp_io_stop(&watches[i]);
    }
    for (size_t i : order) {
        guests[i].reset();
        program.step();
    }
    program.run();
}

// ---- other threads ----

TEST_CASE("guest: posts from other threads, to a loop that another thread opened")
{
    Program program;
    Guest guest(program);
    Pipe pipe;
    constexpr int threads = 3;
    constexpr int each = 2000;
    std::array<int, threads> next = {};
    int out_of_order = 0;
    int total = 0;
    Watch alive; // a post alone does not keep the foreign loop from ending
    alive.start(guest, pipe.reader(), [](uint32_t) {});
    std::vector<std::thread> posters;
    for (int t = 0; t < threads; t++) {
        posters.emplace_back([&, t] {
            for (int i = 0; i < each; i++) {
                post(guest, [&, t, i] {
                    out_of_order += next[static_cast<size_t>(t)]++ != i ? 1 : 0;
                    if (++total == threads * each) {
                        vkp_io_stop(&alive);
                    }
                });
            }
        });
    }
    std::thread runner([&] { program.run(); });
    runner.join();
    for (std::thread &poster : posters) {
        poster.join();
    }
    CHECK(total == threads * each);
    CHECK(out_of_order == 0);
}

TEST_CASE("guest: one post after the other finds the foreign loop, asleep or not")
{
    Program program;
    Guest guest(program);
    constexpr int rounds = 3000;
    std::atomic<int> ran{0};
    std::thread other([&] {
        for (int i = 1; i <= rounds; i++) {
            post(guest, [&] { ran.fetch_add(1); });
            while (ran.load() != i) {
                std::this_thread::yield();
            }
        }
    });
    program.until("posts", [&] { return ran.load() == rounds; });
    other.join();
}

TEST_CASE("guest: a channel between threads")
{
    Program program;
    Guest guest(program);
    vkp_mpsc_config config = {};
    config.elem_bytes = sizeof(int);
    config.capacity_items = 16;
    vkp_mpsc_tx *tx = nullptr;
    struct Reader {
        vkp_mpsc_rx *rx = nullptr;
        vkp_handler *handler = nullptr;
        int next = 0;
        int wrong = 0;
    } reader;
    REQUIRE(vkp_mpsc_open(&config, &tx, &reader.rx) == VKP_OK);
    REQUIRE(vkp_test_handle(
                guest, reader.rx,
                [](void *user) {
                    auto *self = static_cast<Reader *>(user);
                    int value = 0;
                    if (vkp_mpsc_try_recv(self->rx, &value) == VKP_OK) {
                        self->wrong += value != self->next++ ? 1 : 0;
                    } else {
                        vkp_handler_close(self->handler);
                    }
                },
                &reader, &reader.handler) == VKP_OK);
    std::thread sender([tx] {
        for (int i = 0; i < 5000; i++) {
            if (vkp_mpsc_send(tx, &i, VKP_FOREVER) != VKP_OK) {
                vkp_test_fail("a value was refused");
            }
        }
        vkp_mpsc_tx_unref(tx);
    });
    program.run(); // the watch keeps it alive, until the last sender is gone
    sender.join();
    CHECK(reader.next == 5000);
    CHECK(reader.wrong == 0);
    vkp_handler_unref(reader.handler);
    vkp_mpsc_rx_unref(reader.rx);
}

// ---- what keeps the foreign loop alive ----

TEST_CASE("guest: the foreign loop ends when nothing of ours is open")
{
    Program program;
    Guest guest(program);
    int calls = 0;
    SECTION("an open loop alone keeps nobody")
    {
        program.run();
        program.run();
    }
    SECTION("what was posted before the first iteration runs")
    {
        post(guest, [&] { calls++; });
        program.run();
        CHECK(calls == 1);
    }
    SECTION("a descriptor under watch, until its end")
    {
        Pipe pipe;
        Watch watch;
        watch.start(guest, pipe.reader(), [&](uint32_t) {
            calls++;
            vkp_io_stop(&watch);
        });
        std::thread other; // started by the loop: before, it would have nothing to wait for
        post(guest, [&] { other = std::thread([&] { pipe.put(); }); });
        program.run();
        other.join();
        CHECK(calls == 1);
        program.run();
    }
    SECTION("a timer, until it went off")
    {
        Timer timer;
        const uint64_t deadline = vkp_now_ns() + 5 * ms;
        timer.start(guest, 5 * ms, [&] { calls++; });
        program.run();
        CHECK(calls == 1);
        CHECK(vkp_now_ns() >= deadline);
    }
    SECTION("a timer, until it was stopped, in a round or outside")
    {
        Timer far;
        far.start(guest, 3600 * 1000 * ms, [] {});
        vkp_timer_stop(&far);
        program.run();
        far.start(guest, 3600 * 1000 * ms, [] {});
        OwnTimer own(program, 1, [&] {
            calls++;
            vkp_timer_stop(&far);
        });
        program.run();
        CHECK(calls == 1);
        far.start(guest, 3600 * 1000 * ms, [] {});
        Timer near;
        near.start(guest, ms, [&] {
            calls++;
            vkp_timer_stop(&far);
        });
        program.run();
        CHECK(calls == 2);
    }
    SECTION("nothing any more after the close")
    {
        Pipe pipe;
        Watch watch;
        Timer far;
        watch.start(guest, pipe.reader(), [&](uint32_t ready) { calls += ready == 0 ? 1 : 100; });
        far.start(guest, 3600 * 1000 * ms, [] {});
        OwnTimer own(program, 1, [&] { vkp_loop_close(guest); });
        program.run();
        CHECK(calls == 1);
        vkp_timer_stop(&far);
    }
    SECTION("the program's own, which ends it whenever it likes")
    {
        Pipe pipe;
        Watch watch;
        watch.start(guest, pipe.reader(), [](uint32_t) {});
        OwnTimer own(program, 1, [&] {
            calls++;
            program.stop();
        });
        program.run();
        CHECK(calls == 1);
    }
}

// ---- what programs do with it ----

namespace {

// An echo server and its clients, each with so many lines to send.
struct Echo {
    vkp_listener *listener = nullptr;
    int lines = 0;
    int clients = 0;
    int right = 0;
    vkp_loop *loop = nullptr;

    static size_t answer(vkp_conn *conn, void *, const vkp_bytes *in)
    {
        vkp_bytes copy;
        if (vkp_bytes_copy(nullptr, in->data, in->len, &copy) != VKP_OK ||
            vkp_conn_send(conn, &copy) != VKP_OK) {
            vkp_test_fail("an echo failed");
        }
        vkp_bytes_unref(&copy);
        return in->len;
    }

    struct Client {
        Echo *echo;
        vkp_conn *conn = nullptr;
        int left;
        void say()
        {
            vkp_bytes line;
            if (vkp_bytes_copy(nullptr, "hello\n", 6, &line) != VKP_OK ||
                vkp_conn_send(conn, &line) != VKP_OK) {
                vkp_test_fail("a line was refused");
            }
            vkp_bytes_unref(&line);
        }
    };

    static const vkp_conn_ops *server_ops()
    {
        static const vkp_conn_ops ops = [] {
            vkp_conn_ops table = {};
            table.on_data = answer;
            return table;
        }();
        return &ops;
    }
    static const vkp_conn_ops *client_ops()
    {
        static const vkp_conn_ops ops = [] {
            vkp_conn_ops table = {};
            table.on_open = [](vkp_conn *conn, void *user) {
                auto *self = static_cast<Client *>(user);
                self->conn = conn;
                self->say();
            };
            table.on_data = [](vkp_conn *conn, void *user, const vkp_bytes *in) -> size_t {
                auto *self = static_cast<Client *>(user);
                if (in->len < 6) {
                    return 0;
                }
                self->echo->right += memcmp(in->data, "hello\n", 6) == 0 ? 1 : 0;
                if (--self->left > 0) {
                    self->say();
                } else {
                    vkp_conn_close(conn);
                }
                return 6;
            };
            table.on_close = [](vkp_conn *, void *user, vkp_close_reason, int) {
                auto *self = static_cast<Client *>(user);
                if (--self->echo->clients == 0) {
                    vkp_listener_close(self->echo->listener);
                }
            };
            return table;
        }();
        return &ops;
    }
};

} // namespace

TEST_CASE("guest: a listener and its clients in one foreign loop, which ends when they are gone")
{
    Program program;
    Guest guest(program);
    constexpr int count = 10;
    constexpr int each = 50;
    Echo echo;
    const std::string address = vkp_test_fresh_address("echo");
    vkp_listener_config config = {};
    config.address = vkp_str_of(address.c_str());
    config.conn.ops = Echo::server_ops();
    REQUIRE(vkp_listener_open(guest, &config, &echo.listener) == VKP_OK);
    std::vector<Echo::Client> clients(count);
    for (Echo::Client &client : clients) {
        client.echo = &echo;
        client.left = each;
        vkp_conn_config mine = {};
        mine.ops = Echo::client_ops();
        mine.user = &client;
        vkp_conn *conn = nullptr;
        echo.clients++;
        REQUIRE(vkp_conn_connect(guest, vkp_str_of(address.c_str()), &mine, &conn) == VKP_OK);
        vkp_conn_unref(conn);
    }
    program.run();
    CHECK(echo.right == count * each);
    CHECK(echo.clients == 0);
    vkp_listener_unref(echo.listener);
}

TEST_CASE("guest: a client subscribes, publishes and asks")
{
    if (vkp_test_server_program() == nullptr) {
        WARN("left out: there is no valkey-server and no redis-server");
        return;
    }
    std::unique_ptr<vkp_test_server, void (*)(vkp_test_server *)> server(
        vkp_test_server_open(nullptr), vkp_test_server_close);
    Program program;
    Guest guest(program);
    struct State {
        vkp_client *client = nullptr;
        std::vector<std::string> payloads;
        int events = 0;
    } state;
    vkp_client_config config = {};
    config.address = vkp_str_of(vkp_test_server_tcp(server.get()));
    config.user = &state;
    config.on_push = [](void *user, const vkp_push *push) {
        auto *self = static_cast<State *>(user);
        if (push->kind == VKP_PUSH_SUBSCRIBED) {
            self->events++;
        } else if (push->kind == VKP_PUSH_MESSAGE) {
            self->payloads.emplace_back(vkp_test_view(push->payload));
        }
    };
    REQUIRE(vkp_client_open(guest, &config, &state.client) == VKP_OK);
    REQUIRE(vkp_client_subscribe(state.client, VKP_SUB_CHANNEL, vkp_str_of("news")) == VKP_OK);
    program.until("subscription", [&] { return state.events == 1; });
    vkp_oneshot slot;
    vkp_reply *reply = nullptr;
    for (int i = 0; i < 3; i++) {
        REQUIRE(vkp_client_command(state.client, &slot, "PUBLISH", "news", "x", NULL) == VKP_OK);
        vkp_status status = VKP_ERR_EMPTY;
        program.until("reply", [&] {
            status = vkp_oneshot_try_recv(&slot, &reply);
            return status != VKP_ERR_EMPTY;
        });
        REQUIRE(status == VKP_OK);
        vkp_reply_unref(reply);
    }
    program.until("messages", [&] { return state.payloads.size() == 3; });
    CHECK(state.payloads == std::vector<std::string>(3, "x"));
    vkp_client_close(state.client);
    vkp_client_unref(state.client);
    program.run(); // a closed client keeps nobody
}

namespace {
std::atomic<uint64_t> ahead_ns{0};
}

TEST_CASE("guest: a client opened long after the last round has its whole time to connect")
{
    const std::string path = vkp_test_fresh_path("silent");
    const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    REQUIRE(path.size() < sizeof address.sun_path);
    memcpy(address.sun_path, path.c_str(), path.size());
    REQUIRE(bind(fd, reinterpret_cast<sockaddr *>(&address), sizeof address) == 0);
    REQUIRE(listen(fd, 1) == 0); // and never answers
    Program program;
    Guest guest(program);
    ahead_ns = 0;
    guest.sys.clock_ns = [] { return vkp_sys_get_default()->clock_ns() + ahead_ns.load(); };
    program.step();
    ahead_ns = 3600 * 1000 * ms;
    CHECK(vkp_loop_get_now_ns(guest) >= ahead_ns);
    vkp_client_config config = {};
    const std::string where = "unix:" + path;
    config.address = vkp_str_of(where.c_str());
    vkp_client *client = nullptr;
    REQUIRE(vkp_client_open(guest, &config, &client) == VKP_OK);
    for (int i = 0; i < 3; i++) {
        program.step();
    }
    CHECK(vkp_client_get_state(client) == VKP_CLIENT_CONNECTING);
    vkp_client_close(client);
    vkp_client_unref(client);
    close(fd);
    unlink(path.c_str());
}

// ---- fork ----

namespace {

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

TEST_CASE("guest: a forked child gives its reference back, and may go on with the foreign loop")
{
    Program program;
    auto guest = std::make_unique<Guest>(program);
    Pipe pipe;
    Watch watch;
    Timer timer;
    int calls = 0;
    timer.start(*guest, 3600 * 1000 * ms, [] {});
    watch.start(*guest, pipe.reader(), [&](uint32_t ready) { calls += ready != 0 ? 1 : 0; });
    program.step();
    SECTION("and does no more")
    {
        CHECK(in_child([&] {
                  guest->close();
                  return calls;
              }) == 0);
    }
    SECTION("first the foreign loop is forked, then the reference given back")
    {
        CHECK(in_child([&] {
                  foreign().after_fork(program);
                  guest->close();
                  bool on_time = false;
                  OwnTimer own(program, 1, [&] { on_time = true; });
                  program.run();
                  return on_time && calls == 0 ? 0 : 1;
              }) == 0);
    }
    SECTION("first the reference is given back, then the foreign loop forked")
    {
        CHECK(in_child([&] {
                  guest->close();
                  foreign().after_fork(program);
                  bool on_time = false;
                  OwnTimer own(program, 1, [&] { on_time = true; });
                  program.run();
                  return on_time && calls == 0 ? 0 : 1;
              }) == 0);
    }
    // The parent has not noticed.
    pipe.put();
    program.until("events", [&] { return calls > 0; });
    std::atomic<bool> posted{false};
    std::thread([&] { post(*guest, [&] { posted = true; }); }).join();
    program.until("post", [&] { return posted.load(); });
}
