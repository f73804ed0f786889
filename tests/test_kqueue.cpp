// SPDX-License-Identifier: MIT
//
// What the kqueue backend relies on, asked of the kqueue itself: on Linux of the emulation that
// stands in for it, elsewhere of the kernel, so that each confirms the other. Then what the backend
// makes of answers that no suite can provoke. The rest is in backend_conformance.cpp.
#include "support/catch.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <sys/event.h>

#include "support/support.h"

namespace {

constexpr uint64_t ms = 1000000;
constexpr uint32_t both = VKP_IO_READ | VKP_IO_WRITE;
using Event = struct kevent;

template <typename Filter>
Event change(int fd, Filter filter, int flags, unsigned fflags = 0)
{
    Event made;
    EV_SET(&made, static_cast<uintptr_t>(fd), static_cast<decltype(made.filter)>(filter),
           static_cast<decltype(made.flags)>(flags), fflags, 0, nullptr);
    return made;
}

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
    text.resize(got > 0 ? static_cast<size_t>(got) : 0);
    return text;
}

// Two descriptors that are closed at the end, unless a test did: a pipe's, or connected sockets.
struct Ends {
    int fds[2] = {-1, -1};
    explicit Ends(bool sockets)
    {
        if (sockets) {
            vkp_test_socket_pair(fds);
        } else if (pipe(fds) != 0) {
            vkp_test_fail("no pipe: %s", strerror(errno));
        }
    }
    ~Ends()
    {
        end(0);
        end(1);
    }
    Ends(const Ends &) = delete;
    Ends &operator=(const Ends &) = delete;
    void end(int which)
    {
        if (fds[which] >= 0) {
            close(std::exchange(fds[which], -1));
        }
    }
};

struct Pipe : Ends {
    Pipe() : Ends(false)
    {
    }
    int reader() const
    {
        return fds[0];
    }
    int writer() const
    {
        return fds[1];
    }
};

struct Socket : Ends {
    Socket() : Ends(true)
    {
    }
    int mine() const
    {
        return fds[0];
    }
    int peer() const
    {
        return fds[1];
    }
};

class Queue {
  public:
    Queue() : fd(vkp_test_sys()->kqueue_create())
    {
        if (fd < 0) {
            vkp_test_fail("no kqueue: %s", strerror(-fd));
        }
    }
    ~Queue()
    {
        close(fd);
    }
    Queue(const Queue &) = delete;
    Queue &operator=(const Queue &) = delete;

    // The result of changes alone: 0, or a negated errno.
    int apply(const std::vector<Event> &changes)
    {
        return vkp_test_sys()->kevent(fd, changes.data(), static_cast<int>(changes.size()), nullptr,
                                      0, VKP_FOREVER);
    }
    std::vector<Event> answers(const std::vector<Event> &changes, size_t room)
    {
        return call(changes, room, 0);
    }
    std::vector<Event> wait(uint64_t deadline_ns = 0, size_t room = 16)
    {
        return call({}, room, deadline_ns);
    }

  private:
    std::vector<Event> call(const std::vector<Event> &changes, size_t room, uint64_t deadline_ns)
    {
        std::vector<Event> events(room);
        errno = E2BIG;
        result = vkp_test_sys()->kevent(fd, changes.data(), static_cast<int>(changes.size()),
                                        events.data(), static_cast<int>(room), deadline_ns);
        if (errno != E2BIG) {
            vkp_test_fail("kevent changed errno");
        }
        events.resize(result > 0 ? static_cast<size_t>(result) : 0);
        return events;
    }

  public:
    int result = 0; // of the last call
    const int fd;
};

Event reads(int fd)
{
    return change(fd, EVFILT_READ, EV_ADD);
}

Event writes(int fd)
{
    return change(fd, EVFILT_WRITE, EV_ADD);
}

} // namespace

// ---- the kqueue ----

TEST_CASE("kqueue: each direction of a descriptor is a registration, and an event, of its own")
{
    Socket socket;
    Queue queue;
    REQUIRE(queue.apply({reads(socket.mine()), writes(socket.mine())}) == 0);
    put(socket.peer());
    const std::vector<Event> events = queue.wait();
    REQUIRE(events.size() == 2);
    CHECK(events[0].ident == events[1].ident);
    CHECK(events[0].filter != events[1].filter);
    CHECK(queue.apply({change(socket.mine(), EVFILT_WRITE, EV_DELETE)}) == 0);
    REQUIRE(queue.wait().size() == 1);
    CHECK(queue.wait()[0].filter == EVFILT_READ);
    CHECK(queue.apply({change(socket.mine(), EVFILT_WRITE, EV_DELETE)}) == -ENOENT);
    CHECK(queue.apply({change(socket.mine(), EVFILT_READ, EV_DELETE)}) == 0);
    CHECK(queue.wait().empty());
    CHECK(queue.apply({reads(socket.mine()), reads(socket.mine())}) == 0);
    CHECK(queue.wait().size() == 1);
}

TEST_CASE("kqueue: what is ready is reported as long as it is, with EV_CLEAR when there is more")
{
    Pipe pipe;
    Queue queue;
    SECTION("as it is")
    {
        REQUIRE(queue.apply({reads(pipe.reader())}) == 0);
        CHECK(queue.wait().empty());
        put(pipe.writer(), "abc");
        for (intptr_t left = 3; left > 0; left--) {
            const std::vector<Event> events = queue.wait();
            REQUIRE(events.size() == 1);
            CHECK(events[0].data == left);
            CHECK((events[0].flags & (EV_EOF | EV_ERROR)) == 0);
            take(pipe.reader(), 1);
        }
        CHECK(queue.wait().empty());
    }
    SECTION("with EV_CLEAR")
    {
        REQUIRE(queue.apply({change(pipe.reader(), EVFILT_READ, EV_ADD | EV_CLEAR)}) == 0);
        put(pipe.writer());
        CHECK(queue.wait().size() == 1);
        CHECK(queue.wait().empty());
        put(pipe.writer());
        CHECK(queue.wait().size() == 1);
        CHECK(queue.wait().empty());
        take(pipe.reader());
        CHECK(queue.wait().empty());
        put(pipe.writer());
        CHECK(queue.wait().size() == 1);
    }
    SECTION("once")
    {
        REQUIRE(queue.apply({change(pipe.reader(), EVFILT_READ, EV_ADD | EV_ONESHOT)}) == 0);
        put(pipe.writer());
        CHECK(queue.wait().size() == 1);
        CHECK(queue.wait().empty());
        CHECK(queue.apply({change(pipe.reader(), EVFILT_READ, EV_DELETE)}) == -ENOENT);
    }
    SECTION("disabled and enabled")
    {
        put(pipe.writer());
        REQUIRE(queue.apply({change(pipe.reader(), EVFILT_READ, EV_ADD | EV_DISABLE)}) == 0);
        CHECK(queue.wait().empty());
        REQUIRE(queue.apply({change(pipe.reader(), EVFILT_READ, EV_ENABLE)}) == 0);
        CHECK(queue.wait().size() == 1);
        REQUIRE(queue.apply({change(pipe.reader(), EVFILT_READ, EV_DISABLE)}) == 0);
        CHECK(queue.wait().empty());
    }
}

TEST_CASE("kqueue: what stays ready comes last, so that nobody starves")
{
    std::vector<Pipe> pipes(5);
    Queue queue;
    for (const Pipe &pipe : pipes) {
        put(pipe.writer());
        REQUIRE(queue.apply({reads(pipe.reader())}) == 0);
    }
    std::map<uintptr_t, int> seen;
    for (int i = 0; i < 20; i++) {
        const std::vector<Event> events = queue.wait(0, 1);
        REQUIRE(events.size() == 1);
        seen[events[0].ident]++;
    }
    CHECK(seen.size() == pipes.size());
    for (const auto &each : seen) {
        CHECK(each.second == 4);
    }
}

TEST_CASE("kqueue: EV_EOF comes while data is left, and speaks of one direction")
{
    Queue queue;
    SECTION("of a socket whose peer sends no more")
    {
        Socket socket;
        REQUIRE(queue.apply({reads(socket.mine()), writes(socket.mine())}) == 0);
        put(socket.peer(), "abc");
        REQUIRE(shutdown(socket.peer(), SHUT_WR) == 0);
        for (const intptr_t left : {intptr_t(3), intptr_t(0)}) {
            const std::vector<Event> events = queue.wait();
            REQUIRE(events.size() == 2);
            for (const Event &event : events) {
                const bool input = event.filter == EVFILT_READ;
                CHECK(((event.flags & EV_EOF) != 0) == input);
                CHECK(event.fflags == 0);
                CHECK((!input || event.data == left));
            }
            take(socket.mine());
        }
    }
    SECTION("of a socket whose peer is gone")
    {
        Socket socket;
        REQUIRE(queue.apply({reads(socket.mine()), writes(socket.mine())}) == 0);
        socket.end(1);
        const std::vector<Event> events = queue.wait();
        REQUIRE(events.size() == 2);
        CHECK((events[0].flags & events[1].flags & EV_EOF) != 0);
    }
    SECTION("of a pipe that nobody writes")
    {
        Pipe pipe;
        REQUIRE(queue.apply({reads(pipe.reader())}) == 0);
        put(pipe.writer(), "abc");
        pipe.end(1);
        for (const intptr_t left : {intptr_t(3), intptr_t(0)}) {
            const std::vector<Event> events = queue.wait();
            REQUIRE(events.size() == 1);
            CHECK((events[0].flags & EV_EOF) != 0);
            CHECK(events[0].data == left);
            take(pipe.reader());
        }
    }
    SECTION("of a pipe that nobody reads, which is not taken after that")
    {
        Pipe pipe;
        REQUIRE(queue.apply({writes(pipe.writer())}) == 0);
        CHECK((queue.wait()[0].flags & EV_EOF) == 0);
        pipe.end(0);
        REQUIRE(queue.wait().size() == 1);
        CHECK((queue.wait()[0].flags & EV_EOF) != 0);
        Queue other;
        CHECK(other.apply({writes(pipe.writer())}) < 0);
        CHECK(other.wait().empty());
    }
}

TEST_CASE("kqueue: a regular file is readable up to its end, and silent there")
{
    const int file = open(vkp_test_path("kqueue"), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    REQUIRE(file >= 0);
    CHECK(vkp_test_sys()->fd_kind(file) == VKP_FD_FILE);
    {
        Queue queue;
        REQUIRE(queue.apply({reads(file)}) == 0);
        CHECK(queue.wait().empty());
    }
    put(file, "abc");
    REQUIRE(lseek(file, 1, SEEK_SET) == 1);
    {
        Queue queue;
        REQUIRE(queue.apply({reads(file)}) == 0);
        REQUIRE(queue.wait().size() == 1);
        CHECK(queue.wait()[0].data == 2);
        take(file);
        CHECK(queue.wait().empty());
    }
    CHECK(close(file) == 0);
}

TEST_CASE("kqueue: a descriptor that is closed loses its registrations, and its number is free")
{
    Queue queue;
    {
        Pipe pipe;
        Pipe other;
        const int number = pipe.reader();
        const int duplicate = dup(number);
        REQUIRE(duplicate >= 0);
        put(pipe.writer());
        put(other.writer());
        REQUIRE(queue.apply({reads(number)}) == 0);
        CHECK(queue.wait().size() == 1);
        SECTION("by close, though a duplicate lives")
        {
            pipe.end(0);
            CHECK(queue.wait().empty());
            CHECK(queue.apply({change(number, EVFILT_READ, EV_DELETE)}) < 0);
            CHECK(queue.apply({reads(number)}) == -EBADF);
            REQUIRE(dup2(duplicate, number) == number); // the same file, and yet not watched
            CHECK(queue.wait().empty());
            CHECK(close(number) == 0);
        }
        SECTION("by dup2")
        {
            REQUIRE(dup2(other.reader(), number) == number);
            CHECK(queue.wait().empty());
            CHECK(queue.apply({change(number, EVFILT_READ, EV_DELETE)}) == -ENOENT);
            CHECK(queue.apply({reads(number)}) == 0);
            CHECK(queue.wait().size() == 1);
        }
        CHECK(close(duplicate) == 0);
    }
    CHECK(queue.wait().empty());
}

TEST_CASE("kqueue: changes fail one by one")
{
    Pipe pipe;
    Queue queue;
    put(pipe.writer());
    const Event good = reads(pipe.reader());
    const Event bad = change(pipe.reader(), EVFILT_WRITE, EV_DELETE);
    SECTION("without room the first failure ends the call; what came before was done")
    {
        CHECK(queue.apply({good, bad, change(pipe.reader(), EVFILT_READ, EV_DELETE)}) == -ENOENT);
        CHECK(queue.wait().size() == 1);
    }
    SECTION("with room each failure is an event, and all the others are done")
    {
        const std::vector<Event> events = queue.answers({bad, good}, 4);
        REQUIRE(events.size() == 1);
        CHECK((events[0].flags & EV_ERROR) != 0);
        CHECK(events[0].data == ENOENT);
        CHECK(queue.wait().size() == 1);
    }
    SECTION("with EV_RECEIPT successes are events as well, and no other is")
    {
        const std::vector<Event> events =
            queue.answers({change(pipe.reader(), EVFILT_READ, EV_ADD | EV_RECEIPT),
                           change(pipe.reader(), EVFILT_WRITE, EV_DELETE | EV_RECEIPT)},
                          2);
        REQUIRE(events.size() == 2);
        CHECK((events[0].flags & EV_ERROR) != 0);
        CHECK(events[0].data == 0);
        CHECK((events[1].flags & EV_ERROR) != 0);
        CHECK(events[1].data == ENOENT);
        CHECK(queue.wait().size() == 1);
    }
    SECTION("a filter that is not for this descriptor")
    {
        CHECK(queue.apply({change(pipe.reader(), EVFILT_VNODE, EV_ADD)}) == -EINVAL);
    }
    SECTION("no descriptor, and no queue")
    {
        CHECK(queue.apply({reads(9999)}) == -EBADF);
        CHECK(vkp_test_sys()->kevent(-1, nullptr, 0, nullptr, 0, 0) == -EBADF);
        CHECK(vkp_test_sys()->kevent(pipe.reader(), nullptr, 0, nullptr, 0, 0) < 0);
    }
}

TEST_CASE("kqueue: a wait keeps its deadline, and none without room for events")
{
    Pipe pipe;
    Queue queue;
    REQUIRE(queue.apply({reads(pipe.reader())}) == 0); // returns, though the deadline is never
    for (const uint64_t ahead : {uint64_t(1), ms / 3, 2 * ms + 1}) {
        const uint64_t deadline = vkp_now_ns() + ahead;
        CHECK(queue.wait(deadline).empty());
        CHECK(vkp_now_ns() >= deadline);
    }
    CHECK(queue.wait(1).empty());
    std::thread other([&] { put(pipe.writer()); });
    CHECK(queue.wait(VKP_FOREVER).size() == 1);
    other.join();
}

TEST_CASE("kqueue: a signal ends a wait")
{
    Queue queue;
    struct sigaction action = {};
    struct sigaction before = {};
    action.sa_handler = [](int) {};
    REQUIRE(sigaction(SIGALRM, &action, &before) == 0);
    itimerval every = {};
    every.it_interval.tv_usec = 500;
    every.it_value.tv_usec = 500;
    REQUIRE(setitimer(ITIMER_REAL, &every, nullptr) == 0);
    for (int i = 0; i < 5; i++) {
        queue.wait(VKP_FOREVER);
        CHECK(queue.result == -EINTR);
    }
    every = itimerval();
    REQUIRE(setitimer(ITIMER_REAL, &every, nullptr) == 0);
    REQUIRE(sigaction(SIGALRM, &before, nullptr) == 0);
}

TEST_CASE("kqueue: the queue's descriptor can be polled")
{
    Pipe pipe;
    Queue queue;
    const auto readable = [&] {
        pollfd entry = {queue.fd, POLLIN, 0};
        return poll(&entry, 1, 0) == 1;
    };
    REQUIRE(queue.apply({reads(pipe.reader())}) == 0);
    CHECK_FALSE(readable());
    put(pipe.writer());
    CHECK(readable());
    take(pipe.reader());
    CHECK_FALSE(readable());
}

TEST_CASE("kqueue: a forked child has no queue, and the number is free")
{
    Pipe pipe;
    Queue queue;
    REQUIRE(queue.apply({reads(pipe.reader())}) == 0);
    const pid_t pid = fork();
    if (pid == 0) {
        if (fcntl(queue.fd, F_GETFD) != -1 || errno != EBADF) {
            _exit(1);
        }
        if (vkp_test_sys()->kevent(queue.fd, nullptr, 0, nullptr, 0, 0) != -EBADF) {
            _exit(2);
        }
        const int fresh = vkp_test_sys()->kqueue_create(); // gets the number, and knows nothing
        Event event;
        put(pipe.writer());
        _exit(fresh == queue.fd && vkp_test_sys()->kevent(fresh, nullptr, 0, &event, 1, 0) == 0
                  ? 0
                  : 3);
    }
    REQUIRE(pid > 0);
    int status = -1;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
    CHECK(status == 0);
    CHECK(queue.wait().size() == 1);
}

#ifdef EVFILT_USER

namespace {

Queue *signalled_queue;

Event trigger(int ident)
{
    return change(ident, EVFILT_USER, 0, NOTE_TRIGGER);
}

} // namespace

TEST_CASE("kqueue: an event of the program's own, from threads and signal handlers")
{
    Queue queue;
    CHECK(queue.apply({trigger(7)}) == -ENOENT);
    SECTION("with EV_CLEAR many are one, once")
    {
        REQUIRE(queue.apply({change(7, EVFILT_USER, EV_ADD | EV_CLEAR)}) == 0);
        CHECK(queue.wait().empty());
        for (int round = 0; round < 3; round++) {
            for (int i = 0; i < 100; i++) {
                REQUIRE(queue.apply({trigger(7)}) == 0);
            }
            const std::vector<Event> events = queue.wait();
            REQUIRE(events.size() == 1);
            CHECK(events[0].filter == EVFILT_USER);
            CHECK(events[0].ident == 7);
            CHECK(queue.wait().empty());
        }
    }
    SECTION("without, it stays")
    {
        REQUIRE(queue.apply({change(7, EVFILT_USER, EV_ADD), trigger(7)}) == 0);
        CHECK(queue.wait().size() == 1);
        CHECK(queue.wait().size() == 1);
        CHECK(queue.apply({change(7, EVFILT_USER, EV_DELETE)}) == 0);
        CHECK(queue.wait().empty());
    }
    SECTION("the largest identifier is one of no descriptor")
    {
        REQUIRE(queue.apply({change(-1, EVFILT_USER, EV_ADD | EV_CLEAR), trigger(-1)}) == 0);
        REQUIRE(queue.wait(0, 1).size() == 1);
        CHECK(queue.wait().empty());
    }
    SECTION("from another thread, and from a handler on this one")
    {
        REQUIRE(queue.apply({change(7, EVFILT_USER, EV_ADD | EV_CLEAR)}) == 0);
        std::atomic<int> asked{0};
        std::atomic<int> answered{0};
        std::thread other([&] {
            for (int i = 1; i <= 2000; i++) {
                asked.store(i);
                queue.apply({trigger(7)});
                while (answered.load() != i) {
                    std::this_thread::yield();
                }
            }
        });
        while (answered.load() < 2000) {
            REQUIRE(queue.wait(VKP_FOREVER).size() == 1);
            answered.store(asked.load());
        }
        other.join();
        signalled_queue = &queue;
        struct sigaction action = {};
        struct sigaction before = {};
        action.sa_handler = [](int) {
            const Event event = trigger(7);
            vkp_test_sys()->kevent(signalled_queue->fd, &event, 1, nullptr, 0, 0);
        };
        REQUIRE(sigaction(SIGUSR1, &action, &before) == 0);
        queue.wait();
        raise(SIGUSR1);
        CHECK(queue.wait(VKP_FOREVER).size() == 1);
        CHECK(queue.wait().empty());
        REQUIRE(sigaction(SIGUSR1, &before, nullptr) == 0);
    }
}

#endif

// ---- the backend, over answers that are made up ----

namespace {

enum class Mode { real, no_writes, made_up };

struct {
    Mode mode = Mode::real;
    std::vector<Event> events; // of the next wait
    uint64_t deadline_ns = 0;  // of the last
} kernel;

int odd_kevent(int kq, const void *changes, int change_count, void *events, int event_count,
               uint64_t deadline_ns)
{
    const Event *list = static_cast<const Event *>(changes);
    if (kernel.mode == Mode::no_writes && event_count == 0) {
        for (int i = 0; i < change_count; i++) {
            if (list[i].filter == EVFILT_WRITE && (list[i].flags & EV_ADD) != 0) {
                return -ENOMEM;
            }
            const int result = vkp_test_sys()->kevent(kq, &list[i], 1, nullptr, 0, 0);
            if (result < 0) {
                return result;
            }
        }
        return 0;
    }
    if (event_count > 0) {
        kernel.deadline_ns = deadline_ns;
    }
    if (kernel.mode == Mode::made_up && event_count > 0) {
        std::copy(kernel.events.begin(), kernel.events.end(), static_cast<Event *>(events));
        return static_cast<int>(kernel.events.size());
    }
    return vkp_test_sys()->kevent(kq, changes, change_count, events, event_count, deadline_ns);
}

std::vector<const vkp_backend *> kqueue_backends()
{
    std::vector<const vkp_backend *> found;
    for (const vkp_backend *const *at = vkp_test_backends_all(); *at != nullptr; at++) {
        if (std::string((*at)->name).rfind("kqueue", 0) == 0) {
            found.push_back(*at);
        }
    }
    return found;
}

using Ready = std::map<uint64_t, uint32_t>;

class Bench {
  public:
    explicit Bench(const vkp_backend *backend) : backend_(backend), sys_(*vkp_test_sys())
    {
        kernel.mode = Mode::real;
        sys_.kevent = odd_kevent;
        vkp_test_env_init(&test_);
        test_.env.sys = &sys_;
        host_.env = &test_.env;
        if (backend->open(&host_, &state_) != VKP_OK) {
            vkp_test_fail("backend %s does not open", backend->name);
        }
    }
    ~Bench()
    {
        backend_->close(state_);
        vkp_test_env_deinit(&test_);
    }
    Bench(const Bench &) = delete;
    Bench &operator=(const Bench &) = delete;
    vkp_status watch(int fd, uint32_t interest, uint64_t token)
    {
        return backend_->set_interest(state_, fd, interest, token);
    }
    void wake()
    {
        backend_->wake(state_);
    }
    Ready ready(uint64_t deadline_ns = 0)
    {
        vkp_event events[16];
        size_t count = 0;
        if (backend_->wait(state_, deadline_ns, events, 16, &count) != VKP_OK) {
            vkp_test_fail("a wait failed: %s", strerror(errno));
        }
        Ready found;
        for (size_t i = 0; i < count; i++) {
            if (!found.emplace(events[i].token, events[i].ready).second) {
                vkp_test_fail("two events for one token in a batch");
            }
        }
        return found;
    }

  private:
    const vkp_backend *backend_;
    vkp_sys sys_;
    vkp_test_env test_;
    vkp_backend_host host_ = {};
    void *state_ = nullptr;
};

#define ON_EVERY_KQUEUE                                                   \
    REQUIRE(kqueue_backends().size() >= 1);                               \
    const vkp_backend *backend = GENERATE(from_range(kqueue_backends())); \
    INFO("backend " << backend->name)

} // namespace

TEST_CASE("kqueue backend: half a change is taken back, and what was before holds")
{
    ON_EVERY_KQUEUE;
    Socket socket;
    Bench bench(backend);
    put(socket.peer());
    SECTION("nothing was watched")
    {
        kernel.mode = Mode::no_writes;
        errno = 0;
        CHECK(bench.watch(socket.mine(), both, 1) == VKP_ERR_SYS);
        CHECK(errno == ENOMEM);
        kernel.mode = Mode::real;
        CHECK(bench.ready() == Ready{});
        // The queue itself, not only the backend's table: it would keep waits from waiting.
        const uint64_t deadline = vkp_now_ns() + 2 * ms;
        CHECK(bench.ready(deadline) == Ready{});
        CHECK(vkp_now_ns() >= deadline);
        CHECK(bench.watch(socket.mine(), both, 2) == VKP_OK);
        CHECK(bench.ready() == Ready{{2, both}});
    }
    SECTION("reading was")
    {
        REQUIRE(bench.watch(socket.mine(), VKP_IO_READ, 1) == VKP_OK);
        kernel.mode = Mode::no_writes;
        CHECK(bench.watch(socket.mine(), both, 2) == VKP_ERR_SYS);
        CHECK(bench.ready() == Ready{{1, VKP_IO_READ}});
        kernel.mode = Mode::real;
        CHECK(bench.ready() == Ready{{1, VKP_IO_READ}});
    }
    SECTION("writing was")
    {
        REQUIRE(bench.watch(socket.mine(), VKP_IO_WRITE, 1) == VKP_OK);
        kernel.mode = Mode::no_writes;
        CHECK(bench.watch(socket.mine(), both, 2) == VKP_ERR_SYS);
        CHECK(bench.ready() == Ready{{1, VKP_IO_WRITE}});
        kernel.mode = Mode::real;
        CHECK(bench.ready() == Ready{{1, VKP_IO_WRITE}});
    }
}

TEST_CASE("kqueue backend: a socket whose input ends is not hung up, a pipe is when it is drained")
{
    ON_EVERY_KQUEUE;
    Bench bench(backend);
    SECTION("socket, half closed")
    {
        Socket socket;
        REQUIRE(bench.watch(socket.mine(), VKP_IO_READ, 1) == VKP_OK);
        put(socket.peer(), "last words");
        REQUIRE(shutdown(socket.peer(), SHUT_WR) == 0);
        CHECK(bench.ready() == Ready{{1, VKP_IO_READ}});
        CHECK(take(socket.mine()) == "last words");
        CHECK(bench.ready() == Ready{{1, VKP_IO_READ}});
        REQUIRE(bench.watch(socket.mine(), both, 1) == VKP_OK);
        CHECK(bench.ready() == Ready{{1, both}});
        put(socket.mine(), "answer");
        CHECK(take(socket.peer()) == "answer");
    }
    SECTION("socket, closed")
    {
        Socket socket;
        REQUIRE(bench.watch(socket.mine(), both, 1) == VKP_OK);
        socket.end(1);
        CHECK(bench.ready() == Ready{{1, both | VKP_IO_HUP}});
    }
    SECTION("pipe")
    {
        Pipe pipe;
        REQUIRE(bench.watch(pipe.reader(), VKP_IO_READ, 1) == VKP_OK);
        put(pipe.writer(), "last words");
        pipe.end(1);
        CHECK(bench.ready() == Ready{{1, VKP_IO_READ}});
        CHECK(take(pipe.reader()) == "last words");
        CHECK(bench.ready() == Ready{{1, both | VKP_IO_HUP}});
    }
}

TEST_CASE("kqueue backend: errors in events are told, whatever the interest")
{
    ON_EVERY_KQUEUE;
    Socket socket;
    Bench bench(backend);
    REQUIRE(bench.watch(socket.mine(), VKP_IO_READ, 1) == VKP_OK);
    kernel.mode = Mode::made_up;
    Event event = change(socket.mine(), EVFILT_READ, EV_ERROR);
    event.data = EIO;
    kernel.events = {event};
    CHECK(bench.ready() == Ready{{1, both | VKP_IO_ERROR}});
    kernel.events = {change(socket.mine(), EVFILT_READ, EV_EOF, ECONNRESET)};
    CHECK(bench.ready() == Ready{{1, both | VKP_IO_ERROR}});
    REQUIRE(bench.watch(socket.mine(), VKP_IO_WRITE, 2) == VKP_OK);
    kernel.events = {change(socket.mine(), EVFILT_WRITE, EV_EOF, ECONNREFUSED)};
    CHECK(bench.ready() == Ready{{2, both | VKP_IO_HUP | VKP_IO_ERROR}});
    kernel.events = {};
    CHECK(bench.ready() == Ready{});
}

TEST_CASE("kqueue backend: the two events of a descriptor are one, whatever comes between them")
{
    ON_EVERY_KQUEUE;
    std::vector<Socket> sockets(3);
    Bench bench(backend);
    Ready expected;
    kernel.events.clear();
    for (size_t i = 0; i < sockets.size(); i++) {
        REQUIRE(bench.watch(sockets[i].mine(), both, i) == VKP_OK);
        kernel.events.push_back(change(sockets[i].mine(), EVFILT_WRITE, 0));
        expected[i] = both;
    }
    for (const Socket &socket : sockets) {
        kernel.events.push_back(change(socket.mine(), EVFILT_READ, 0));
    }
    kernel.mode = Mode::made_up;
    for (int i = 0; i < 3; i++) {
        CHECK(bench.ready() == expected);
        std::reverse(kernel.events.begin(), kernel.events.end());
    }
}

TEST_CASE("kqueue backend: the deadline reaches the kernel as it is")
{
    ON_EVERY_KQUEUE;
    Bench bench(backend);
    for (const uint64_t deadline : {uint64_t(0), uint64_t(1), vkp_now_ns() + ms, VKP_FOREVER}) {
        bench.wake();
        CHECK(bench.ready(deadline) == Ready{});
        CHECK(kernel.deadline_ns == deadline);
    }
}
