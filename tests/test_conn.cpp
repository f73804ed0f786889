// SPDX-License-Identifier: MIT
//
// Connections over every backend: each callback as often as its contract says, partial input and
// output, back-pressure and the five policies on the loop's thread and from others, closing at
// every moment, connecting, memory that fails and memory that is pinned.
#include "support/catch.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <functional>
#include <future>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "support/support.h"

namespace {

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

// ---- a wire that lets through what a test allows ----

constexpr int64_t unlimited = INT64_MAX;

struct Wire {
    std::atomic<int64_t> allowance; // bytes that may still go out; at 0 sends get EAGAIN
    std::atomic<int> calls;
    std::atomic<int> ranges;
    std::function<int64_t(size_t)> script; // of one thread: bytes allowed now, or a negated errno
};
Wire wire;

int64_t wire_send(int fd, const vkp_range *ranges, size_t count)
{
    std::vector<vkp_range> cut;
    size_t offered = 0;
    for (size_t i = 0; i < count; i++) {
        offered += ranges[i].len;
    }
    wire.calls++;
    wire.ranges += static_cast<int>(count);
    const int64_t most = wire.script ? wire.script(offered) : wire.allowance.load();
    if (most < 0) {
        return most;
    }
    if (most == 0) {
        return -EAGAIN;
    }
    size_t left = std::min(offered, static_cast<size_t>(most));
    for (size_t i = 0; i < count && left > 0; i++) {
        cut.push_back({ranges[i].base, std::min(left, ranges[i].len)});
        left -= cut.back().len;
    }
    const int64_t put = vkp_sys_get_default()->send(fd, cut.data(), cut.size());
    if (put > 0 && wire.allowance != unlimited) {
        wire.allowance -= put;
    }
    return put;
}

const vkp_sys *wired()
{
    static const vkp_sys table = [] {
        vkp_sys copy = *vkp_sys_get_default();
        copy.send = wire_send;
        return copy;
    }();
    wire.allowance = unlimited;
    wire.calls = 0;
    wire.ranges = 0;
    wire.script = nullptr;
    return &table;
}

// ---- loops, connections, peers ----

// A loop that checks at its end that it gave everything back. Declared first, it ends last.
class Loop {
  public:
    explicit Loop(const vkp_backend *backend, const vkp_sys *sys = nullptr, size_t read_bytes = 0)
        : fds_before_(vkp_test_fd_count())
    {
        vkp_test_env_init(&test);
        test.env.sys = sys;
        vkp_loop_config config = {};
        config.backend = backend;
        config.env = &test.env;
        config.read_bytes = read_bytes;
        if (vkp_loop_open(&config, &loop_) != VKP_OK) {
            vkp_test_fail("no loop over %s", backend->name);
        }
    }
    ~Loop()
    {
        close();
        if (std::uncaught_exceptions() == 0) {
            if (vkp_test_fd_count() != fds_before_) {
                vkp_test_fail("descriptors are still open");
            }
            vkp_test_env_deinit(&test);
        }
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
    void round(uint64_t deadline_ns = 0)
    {
        if (vkp_loop_run_once(loop_, deadline_ns) != VKP_OK) {
            vkp_test_fail("a round failed");
        }
    }
    void rounds(int count)
    {
        for (int i = 0; i < count; i++) {
            round();
        }
    }
    size_t live_bytes()
    {
        return vkp_test_env_live_bytes(&test);
    }
    size_t live_blocks()
    {
        return vkp_test_env_live_blocks(&test);
    }
    void fault(vkp_test_fault fault, uint64_t k)
    {
        vkp_test_env_fault(&test, fault, k);
    }

    vkp_test_env test;

  private:
    int fds_before_;
    vkp_loop *loop_ = nullptr;
};

// A connection that records what it is told, and says what a test wants it to say.
struct Conn {
    vkp_conn *conn = nullptr; // a reference of its own
    vkp_conn_config config = {};
    int opens = 0;
    int ends = 0;
    int drains = 0;
    int closes = 0;
    int after_close = 0;
    vkp_close_reason reason = VKP_CLOSE_LOCAL;
    int error = 0;
    std::string data; // what on_data used
    std::vector<std::string> told;
    std::function<void(vkp_conn *)> on_open;
    std::function<size_t(vkp_conn *, std::string_view)> on_data;
    std::function<void(vkp_conn *)> on_drain;
    std::function<bool(vkp_conn *)> on_end;
    std::function<void(vkp_conn *)> on_close;

    Conn()
    {
        config.ops = table(false);
        config.user = this;
    }
    ~Conn()
    {
        drop();
    }
    Conn(const Conn &) = delete;
    Conn &operator=(const Conn &) = delete;
    void drop()
    {
        if (conn != nullptr) {
            vkp_conn_close(conn);
            vkp_conn_unref(std::exchange(conn, nullptr));
        }
    }
    // The table with frame_len merges neighbours.
    void merging()
    {
        config.ops = table(true);
    }
    vkp_status open(vkp_loop *loop, int fd)
    {
        vkp_status status = vkp_conn_open(loop, fd, &config, &conn);
        if (status != VKP_OK) {
            close(fd);
        }
        return status;
    }
    vkp_conn_stats stats() const
    {
        vkp_conn_stats stats;
        vkp_conn_get_stats(conn, &stats);
        return stats;
    }

  private:
    static Conn *of(vkp_conn *, void *user, const char *what)
    {
        Conn *self = static_cast<Conn *>(user);
        self->told.push_back(what);
        self->after_close += self->closes > 0;
        return self;
    }
    static const vkp_conn_ops *table(bool merges)
    {
        static const vkp_conn_ops tables[2] = {make(nullptr), make(vkp_resp_get_frame_len)};
        return &tables[merges];
    }
    static vkp_conn_ops make(size_t (*frame_len)(const uint8_t *data, size_t len))
    {
        vkp_conn_ops ops = {};
        ops.on_open = [](vkp_conn *conn, void *user) {
            Conn *self = of(conn, user, "open");
            self->opens++;
            if (self->on_open) {
                self->on_open(conn);
            }
        };
        ops.on_data = [](vkp_conn *conn, void *user, const vkp_bytes *in) {
            Conn *self = of(conn, user, "data");
            const std::string_view view(reinterpret_cast<const char *>(in->data), in->len);
            const size_t used = self->on_data ? self->on_data(conn, view) : view.size();
            self->data.append(view.substr(0, used)); // the view stays, even after a close
            return used;
        };
        ops.on_drain = [](vkp_conn *conn, void *user) {
            Conn *self = of(conn, user, "drain");
            self->drains++;
            if (self->on_drain) {
                self->on_drain(conn);
            }
        };
        ops.on_end = [](vkp_conn *conn, void *user) {
            Conn *self = of(conn, user, "end");
            self->ends++;
            return self->on_end ? self->on_end(conn) : false;
        };
        ops.on_close = [](vkp_conn *conn, void *user, vkp_close_reason reason, int error) {
            Conn *self = of(conn, user, "close");
            self->closes++;
            self->reason = reason;
            self->error = error;
            if (self->on_close) {
                self->on_close(conn);
            }
        };
        ops.frame_len = frame_len;
        return ops;
    }
};

// The other end: a descriptor that never blocks.
class Peer {
  public:
    explicit Peer(int fd) : fd_(fd)
    {
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
#ifdef SO_NOSIGPIPE
        int on = 1;
        setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
#endif
    }
    ~Peer()
    {
        shut();
    }
    Peer(const Peer &) = delete;
    Peer &operator=(const Peer &) = delete;
    int fd() const
    {
        return fd_;
    }
    void shut()
    {
        if (fd_ >= 0) {
            ::close(std::exchange(fd_, -1));
        }
    }
    void shut_writing()
    {
        ::shutdown(fd_, SHUT_WR);
    }
    // What fits; the whole text unless the other side does not read.
    size_t say(std::string_view text)
    {
        int flags = 0;
#ifdef MSG_NOSIGNAL
        flags = MSG_NOSIGNAL;
#endif
        const ssize_t put = ::send(fd_, text.data(), text.size(), flags);
        return put > 0 ? static_cast<size_t>(put) : 0;
    }
    // Everything that is there.
    const std::string &hear(size_t most = SIZE_MAX)
    {
        char buffer[65536];
        while (most > 0) {
            const ssize_t got = ::read(fd_, buffer, std::min(most, sizeof buffer));
            if (got < 0 && errno == EINTR) {
                continue;
            }
            ended = ended || got == 0 || (got < 0 && errno == ECONNRESET);
            if (got <= 0) {
                break;
            }
            heard.append(buffer, static_cast<size_t>(got));
            most -= static_cast<size_t>(got);
        }
        return heard;
    }

    std::string heard;
    bool ended = false;

  private:
    int fd_;
};

// A connection and its peer over a socket pair.
struct Link {
    Conn end;
    std::unique_ptr<Peer> peer;

    explicit Link(bool merges = false)
    {
        if (merges) {
            end.merging();
        }
    }
    void open(vkp_loop *loop, int send_buffer = 0)
    {
        int fds[2];
        vkp_test_socket_pair(fds);
        if (send_buffer > 0) {
            setsockopt(fds[0], SOL_SOCKET, SO_SNDBUF, &send_buffer, sizeof send_buffer);
        }
        peer = std::make_unique<Peer>(fds[1]);
        if (end.open(loop, fds[0]) != VKP_OK) {
            vkp_test_fail("no connection");
        }
    }
    operator vkp_conn *() const
    {
        return end.conn;
    }
};

// vkp_loop_run in a thread of its own; then this thread is "another thread".
class Runner {
  public:
    explicit Runner(vkp_loop *loop) : loop_(loop)
    {
        thread_ = std::thread([this] { status_ = vkp_loop_run(loop_); });
        call([] {});
    }
    ~Runner()
    {
        stop();
    }
    Runner(const Runner &) = delete;
    Runner &operator=(const Runner &) = delete;
    void stop()
    {
        if (thread_.joinable()) {
            go();
            vkp_loop_stop(loop_);
            thread_.join();
            if (status_ != VKP_OK) {
                vkp_test_fail("the loop failed");
            }
        }
    }
    // On the loop's thread; returns when it ran.
    void call(std::function<void()> what)
    {
        std::promise<void> done;
        post([&] {
            what();
            done.set_value();
        });
        done.get_future().get();
    }
    // The loop's thread stands still until go.
    void stall()
    {
        std::promise<void> standing;
        gate_ = std::make_unique<std::promise<void>>();
        opened_ = false;
        post([this, &standing] {
            std::future<void> opened = gate_->get_future();
            standing.set_value();
            opened.get();
        });
        standing.get_future().get();
    }
    void go()
    {
        if (gate_) {
            open();
            call([] {});
            gate_.reset();
        }
    }
    // Without waiting; go does that.
    void open()
    {
        if (!std::exchange(opened_, true)) {
            gate_->set_value();
        }
    }

  private:
    void post(std::function<void()> what)
    {
        auto *copy = new std::function<void()>(std::move(what));
        if (vkp_loop_post(
                loop_,
                [](void *user) {
                    std::unique_ptr<std::function<void()>> own(
                        static_cast<std::function<void()> *>(user));
                    (*own)();
                },
                copy) != VKP_OK) {
            vkp_test_fail("no post");
        }
    }
    vkp_loop *loop_;
    vkp_status status_ = VKP_OK;
    std::unique_ptr<std::promise<void>> gate_;
    bool opened_ = false;
    std::thread thread_;
};

vkp_status push(vkp_conn *conn, std::string_view text, uint64_t deadline_ns = 0)
{
    vkp_bytes frame;
    if (vkp_bytes_copy(nullptr, text.data(), text.size(), &frame) != VKP_OK) {
        vkp_test_fail("no frame");
    }
    vkp_status status = vkp_conn_push(conn, &frame, deadline_ns);
    vkp_bytes_unref(&frame);
    return status;
}

vkp_status send_text(vkp_conn *conn, std::string_view text)
{
    vkp_bytes frame;
    if (vkp_bytes_copy(nullptr, text.data(), text.size(), &frame) != VKP_OK) {
        vkp_test_fail("no frame");
    }
    vkp_status status = vkp_conn_send(conn, &frame);
    vkp_bytes_unref(&frame);
    return status;
}

// A RESP3 push of fixed length whose one element is the number.
std::string numbered(int number, size_t digits = 6)
{
    std::string text = std::to_string(number);
    text.insert(0, digits - text.size(), '0');
    return ">1\r\n$" + std::to_string(digits) + "\r\n" + text + "\r\n";
}

std::string numbers(int from, int until)
{
    std::string all;
    for (int i = from; i < until; i++) {
        all += numbered(i);
    }
    return all;
}

// Slices [i * each, ...) of one block that holds the text.
class Sliced {
  public:
    Sliced(std::string_view text, size_t each, const vkp_env *env = nullptr) : each_(each)
    {
        if (vkp_bytes_copy(env, text.data(), text.size(), &block_) != VKP_OK) {
            vkp_test_fail("no block");
        }
    }
    ~Sliced()
    {
        vkp_bytes_unref(&block_);
    }
    Sliced(const Sliced &) = delete;
    Sliced &operator=(const Sliced &) = delete;
    vkp_status push(vkp_conn *conn, size_t index) const
    {
        return give(vkp_conn_push_now, conn, index);
    }
    vkp_status send(vkp_conn *conn, size_t index) const
    {
        return give(vkp_conn_send, conn, index);
    }

  private:
    static vkp_status vkp_conn_push_now(vkp_conn *conn, const vkp_bytes *frame)
    {
        return vkp_conn_push(conn, frame, 0);
    }
    vkp_status give(vkp_status (*fn)(vkp_conn *conn, const vkp_bytes *frame), vkp_conn *conn,
                    size_t index) const
    {
        vkp_bytes slice = vkp_bytes_slice(&block_, index * each_, each_);
        vkp_status status = fn(conn, &slice);
        vkp_bytes_unref(&slice);
        return status;
    }
    vkp_bytes block_;
    size_t each_;
};

const size_t numbered_bytes = numbered(0).size();

std::string noise(size_t bytes)
{
    std::string text(bytes, '\0');
    uint32_t state = 12345;
    for (char &byte : text) {
        state = state * 1664525u + 1013904223u;
        byte = static_cast<char>(state >> 24);
    }
    return text;
}

void hear_until(Loop &loop, Link &link, const char *what, const std::function<bool()> &done)
{
    vkp_test_run_until(loop, what, [&] {
        link.peer->hear();
        return done();
    });
}

} // namespace

// ---- open and close ----

TEST_CASE("conn: open calls on_open once, close calls on_close once, before they return")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    int fds[2];
    vkp_test_socket_pair(fds);
    Peer peer(fds[1]);
    Conn end;
    bool open_inside = false;
    end.on_open = [&](vkp_conn *conn) { open_inside = vkp_conn_is_open(conn); };
    REQUIRE(end.open(loop, fds[0]) == VKP_OK);
    CHECK(open_inside);
    CHECK(end.opens == 1);
    CHECK(vkp_conn_is_open(end.conn));
    CHECK(vkp_conn_get_fd(end.conn) == fds[0]);
    CHECK(vkp_conn_get_loop(end.conn) == static_cast<vkp_loop *>(loop));
    CHECK(vkp_conn_get_user(end.conn) == &end);
    CHECK(fcntl(fds[0], F_GETFL) & O_NONBLOCK);
    CHECK(fcntl(fds[0], F_GETFD) & FD_CLOEXEC);
    CHECK(end.stats().queued_frames == 0);
    CHECK(end.stats().queued_bytes == 0);
    CHECK(end.stats().dropped_frames == 0);
    loop.rounds(3);
    CHECK(end.opens == 1);
    CHECK(end.closes == 0);
    vkp_conn_close(end.conn);
    CHECK(end.closes == 1);
    CHECK(end.reason == VKP_CLOSE_LOCAL);
    CHECK(end.error == 0);
    CHECK_FALSE(vkp_conn_is_open(end.conn));
    CHECK(vkp_conn_get_fd(end.conn) == -1);
    vkp_conn_close(end.conn);
    CHECK(push(end.conn, "x") == VKP_ERR_CLOSED);
    CHECK(send_text(end.conn, "x") == VKP_ERR_CLOSED);
    vkp_conn_pause(end.conn);
    vkp_conn_resume(end.conn);
    vkp_conn_drain(end.conn);
    loop.rounds(3);
    CHECK(end.closes == 1);
    CHECK(end.told == std::vector<std::string>{"open", "close"});
    peer.hear();
    CHECK(peer.ended);
}

TEST_CASE("conn: what open refuses stays the caller's")
{
    Loop loop(&vkp_backend_poll);
    int fds[2];
    vkp_test_socket_pair(fds);
    Conn end;
    vkp_conn *conn = nullptr;
    vkp_conn_config none = {};
    CHECK(vkp_conn_open(nullptr, fds[0], &end.config, &conn) == VKP_ERR_INVALID);
    CHECK(vkp_conn_open(loop, -1, &end.config, &conn) == VKP_ERR_INVALID);
    CHECK(vkp_conn_open(loop, fds[0], nullptr, &conn) == VKP_ERR_INVALID);
    CHECK(vkp_conn_open(loop, fds[0], &none, &conn) == VKP_ERR_INVALID);
    CHECK(vkp_conn_open(loop, fds[0], &end.config, nullptr) == VKP_ERR_INVALID);
    vkp_loop *mine = vkp_loop_ref(loop);
    loop.close();
    CHECK(vkp_conn_open(mine, fds[0], &end.config, &conn) == VKP_ERR_CLOSED);
    CHECK(vkp_conn_connect(mine, vkp_str_of("unix:x"), &end.config, &conn) == VKP_ERR_CLOSED);
    vkp_loop_unref(mine);
    CHECK(conn == nullptr);
    CHECK(end.told.empty());
    CHECK(fcntl(fds[0], F_GETFD) >= 0);
    close(fds[0]);
    close(fds[1]);
    vkp_conn_unref(nullptr);
    vkp_conn_close(nullptr);
}

TEST_CASE("conn: a table without callbacks")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    const vkp_conn_ops ops = {};
    vkp_conn_config config = {};
    config.ops = &ops;
    int fds[2];
    vkp_test_socket_pair(fds);
    Peer peer(fds[1]);
    vkp_conn *conn = nullptr;
    REQUIRE(vkp_conn_open(loop, fds[0], &config, &conn) == VKP_OK);
    CHECK(vkp_conn_get_user(conn) == nullptr);
    vkp_conn_set_user(conn, &loop);
    CHECK(vkp_conn_get_user(conn) == &loop);
    CHECK(peer.say("nobody reads this") > 0);
    CHECK(push(conn, "hello") == VKP_OK);
    vkp_test_run_until(loop, "the push", [&] { return peer.hear() == "hello"; });
    peer.shut();
    vkp_test_run_until(loop, "the end", [&] { return !vkp_conn_is_open(conn); });
    vkp_conn_unref(conn);
}

TEST_CASE("conn: data, then the end, then the close")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Link link;
    link.open(loop);
    REQUIRE(link.peer->say("last words") == 10);
    link.peer->shut();
    vkp_test_run_until(loop, "the close", [&] { return link.end.closes > 0; });
    loop.rounds(3);
    CHECK(link.end.data == "last words");
    CHECK(link.end.told == std::vector<std::string>{"open", "data", "end", "close"});
    CHECK(link.end.reason == VKP_CLOSE_PEER);
    CHECK(link.end.error == 0);
    CHECK_FALSE(vkp_conn_is_open(link));
}

TEST_CASE("conn: on_end may keep the connection to write")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Link link;
    link.end.on_end = [](vkp_conn *) { return true; };
    link.open(loop);
    REQUIRE(link.peer->say("question") == 8);
    link.peer->shut_writing();
    vkp_test_run_until(loop, "the end", [&] { return link.end.ends > 0; });
    loop.rounds(5);
    CHECK(link.end.ends == 1);
    CHECK(link.end.closes == 0);
    CHECK(vkp_conn_is_open(link));
    CHECK(push(link, "a push ") == VKP_OK);
    CHECK(send_text(link, "and an answer") == VKP_OK);
    loop.rounds(5);
    CHECK(link.peer->hear() == "a push and an answer");
    CHECK_FALSE(link.peer->ended);
    SECTION("ended by drain")
    {
        CHECK(send_text(link, "!") == VKP_OK);
        vkp_conn_drain(link);
        hear_until(loop, link, "the close", [&] { return link.end.closes > 0; });
        CHECK(link.peer->hear() == "a push and an answer!");
    }
    SECTION("ended by close")
    {
        vkp_conn_close(link);
    }
    link.peer->hear();
    CHECK(link.peer->ended);
    CHECK(link.end.closes == 1);
    CHECK(link.end.ends == 1);
    CHECK(link.end.reason == VKP_CLOSE_LOCAL);
}

TEST_CASE("conn: an end nobody writes after costs no rounds")
{
    const vkp_backend *backend = GENERATE(from_range([] {
        std::vector<const vkp_backend *> real;
        for (const vkp_backend *const *at = vkp_test_backends(); *at != nullptr; at++) {
            real.push_back(*at);
        }
        return real;
    }()));
    INFO("backend " << backend->name);
    Loop loop(backend);
    Link link;
    link.end.on_end = [](vkp_conn *) { return true; };
    link.open(loop);
    link.peer->shut_writing();
    vkp_test_run_until(loop, "the end", [&] { return link.end.ends > 0; });
    // Only the timer ends these waits: a descriptor that stays ready would make them many.
    vkp_timer timer = {};
    static bool fired;
    fired = false;
    REQUIRE(vkp_timer_start(
                &timer, loop, [](vkp_timer *) { fired = true; }, 0, vkp_after_ms(20)) == VKP_OK);
    int rounds = 0;
    for (; !fired; rounds++) {
        loop.round(vkp_test_deadline());
    }
    CHECK(rounds <= 3);
}

TEST_CASE("conn: a reset tells its error")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    int listening = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t bytes = sizeof address;
    REQUIRE(bind(listening, reinterpret_cast<sockaddr *>(&address), bytes) == 0);
    REQUIRE(listen(listening, 4) == 0);
    REQUIRE(getsockname(listening, reinterpret_cast<sockaddr *>(&address), &bytes) == 0);
    const std::string text = "tcp:127.0.0.1:" + std::to_string(ntohs(address.sin_port));
    int peer = vkp_test_connect(text.c_str());
    REQUIRE(peer >= 0);
    Conn end;
    REQUIRE(end.open(loop, accept(listening, nullptr, nullptr)) == VKP_OK);
    const linger now = {1, 0};
    setsockopt(peer, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(peer);
    close(listening);
    vkp_test_run_until(loop, "the reset", [&] { return end.closes > 0; });
    CHECK(end.closes == 1);
    CHECK(end.error == ECONNRESET);
    CHECK(end.ends == 0);
}

TEST_CASE("conn: every reason has a text")
{
    std::vector<std::string> seen;
    for (int reason = VKP_CLOSE_LOCAL; reason <= VKP_CLOSE_NOMEM; reason++) {
        const char *text = vkp_close_reason_str(static_cast<vkp_close_reason>(reason));
        REQUIRE(text != nullptr);
        CHECK(std::find(seen.begin(), seen.end(), text) == seen.end());
        seen.push_back(text);
    }
}

TEST_CASE("conn: closing the loop closes every connection, whatever it waits for")
{
    ON_EVERY_BACKEND;
    Loop loop(backend, wired());
    Link idle;
    Link paused;
    Link blocked;
    Link draining;
    Link ended;
    Link hung_up;
    ended.end.on_end = [](vkp_conn *) { return true; };
    Link *all[] = {&idle, &paused, &blocked, &draining, &ended, &hung_up};
    for (Link *link : all) {
        link->open(loop);
    }
    wire.allowance = 0;
    vkp_conn_pause(paused);
    CHECK(push(blocked, "x") == VKP_OK);
    CHECK(push(draining, "x") == VKP_OK);
    vkp_conn_drain(draining);
    ended.peer->shut_writing();
    vkp_conn_pause(hung_up);
    CHECK(hung_up.peer->say("unread") == 6);
    hung_up.peer->shut();
    loop.rounds(5);
    loop.close();
    for (Link *link : all) {
        CHECK(link->end.closes == 1);
        CHECK(link->end.after_close == 0);
        CHECK(link->end.reason == VKP_CLOSE_LOOP);
        CHECK_FALSE(vkp_conn_is_open(*link));
    }
}

TEST_CASE("conn: a hang-up met in the round that paused the connection is not forgotten")
{
    // Both hang up before the round; whichever is told first pauses the other, whose event is
    // fetched already.
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Link a;
    Link b;
    Link *paused = nullptr;
    auto pause_other = [&](Link &other) {
        return [&](vkp_conn *, std::string_view view) {
            if (paused == nullptr) {
                paused = &other;
                vkp_conn_pause(other);
            }
            return view.size();
        };
    };
    a.end.on_data = pause_other(b);
    b.end.on_data = pause_other(a);
    a.open(loop);
    b.open(loop);
    for (Link *link : {&a, &b}) {
        REQUIRE(link->peer->say("bye") == 3);
        link->peer->shut();
    }
    vkp_test_run_until(loop, "one of them", [&] { return a.end.closes + b.end.closes > 0; });
    loop.rounds(5);
    REQUIRE(paused != nullptr);
    CHECK(paused->end.closes == 0);
    CHECK(paused->end.data.empty());
    SECTION("resumed, it tells all")
    {
        vkp_conn_resume(*paused);
        vkp_test_run_until(loop, "the other", [&] { return paused->end.closes > 0; });
        CHECK(paused->end.data == "bye");
        CHECK(paused->end.ends == 1);
        CHECK(paused->end.reason == VKP_CLOSE_PEER);
    }
    SECTION("the loop closes it")
    {
        loop.close();
        CHECK(paused->end.closes == 1);
        CHECK(paused->end.reason == VKP_CLOSE_LOOP);
    }
    SECTION("drained, it ends")
    {
        CHECK(push(*paused, "nobody gets this") == VKP_OK);
        vkp_conn_drain(*paused);
        vkp_test_run_until(loop, "the other", [&] { return paused->end.closes > 0; });
    }
    CHECK(a.end.closes == 1);
    CHECK(b.end.closes == 1);
}

TEST_CASE("conn: nothing opens on a loop that is closing")
{
    // A program that reconnects in on_close must not keep the loop from ending.
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Link link;
    int fds[2];
    vkp_test_socket_pair(fds);
    Conn next;
    vkp_status status = VKP_OK;
    link.end.on_close = [&](vkp_conn *conn) {
        status = vkp_conn_open(vkp_conn_get_loop(conn), fds[0], &next.config, &next.conn);
    };
    link.open(loop);
    loop.close();
    CHECK(link.end.closes == 1);
    CHECK(status == VKP_ERR_CLOSED);
    CHECK(next.conn == nullptr);
    close(fds[0]);
    close(fds[1]);
}

TEST_CASE("conn: close inside every callback")
{
    ON_EVERY_BACKEND;
    const bool unref_too = GENERATE(false, true);
    INFO("and unref: " << unref_too);
    Loop loop(backend, wired());
    Link link;
    auto finish = [&](vkp_conn *conn) {
        vkp_conn_close(conn);
        if (unref_too) {
            vkp_conn_unref(std::exchange(link.end.conn, nullptr));
        }
    };
    SECTION("on_open")
    {
        link.end.on_open = [&](vkp_conn *conn) { vkp_conn_close(conn); };
        link.open(loop);
        CHECK_FALSE(vkp_conn_is_open(link));
    }
    SECTION("on_data, with more to come")
    {
        link.end.on_data = [&](vkp_conn *conn, std::string_view) {
            finish(conn);
            return size_t{1};
        };
        link.open(loop);
        REQUIRE(link.peer->say("abc") == 3);
        vkp_test_run_until(loop, "the close", [&] { return link.end.closes > 0; });
        CHECK(link.end.data == "a");
        (void)link.peer->say("def");
    }
    SECTION("on_end")
    {
        link.end.on_end = [&](vkp_conn *conn) {
            finish(conn);
            return true;
        };
        link.open(loop);
        link.peer->shut();
        vkp_test_run_until(loop, "the close", [&] { return link.end.closes > 0; });
    }
    SECTION("on_drain")
    {
        link.end.on_drain = finish;
        link.open(loop);
        wire.allowance = 0;
        CHECK(push(link, "x") == VKP_OK);
        loop.rounds(2);
        wire.allowance = unlimited;
        hear_until(loop, link, "the close", [&] { return link.end.closes > 0; });
        CHECK(link.peer->heard == "x");
    }
    SECTION("on_close")
    {
        link.end.on_close = finish;
        link.open(loop);
        vkp_conn_close(link);
    }
    loop.rounds(5);
    CHECK(link.end.closes == 1);
    CHECK(link.end.after_close == 0);
    CHECK(link.end.reason == VKP_CLOSE_LOCAL);
}

TEST_CASE("conn: references are no life: a connection goes on without the caller's")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Link link;
    link.open(loop);
    CHECK(vkp_conn_ref(link) == static_cast<vkp_conn *>(link));
    vkp_conn_unref(link);
    vkp_conn_unref(std::exchange(link.end.conn, nullptr));
    REQUIRE(link.peer->say("still there?") == 12);
    vkp_test_run_until(loop, "data", [&] { return link.end.data == "still there?"; });
    link.peer->shut();
    vkp_test_run_until(loop, "the close", [&] { return link.end.closes > 0; });
}

TEST_CASE("conn: a handle outlives the connection and its loop")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Link link;
    link.open(loop);
    loop.close();
    CHECK(link.end.closes == 1);
    CHECK_FALSE(vkp_conn_is_open(link));
    CHECK(push(link, "x") == VKP_ERR_CLOSED);
    CHECK(send_text(link, "x") == VKP_ERR_CLOSED);
    std::thread([&] {
        CHECK_NOTHROW(vkp_conn_close(link));
        vkp_conn_unref(std::exchange(link.end.conn, nullptr)); // from another thread
    }).join();
}

TEST_CASE("conn: many threads close one connection once")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Link link;
    link.open(loop);
    {
        Runner runner(loop);
        std::promise<void> closed;
        runner.call([&] { link.end.on_close = [&](vkp_conn *) { closed.set_value(); }; });
        std::vector<std::thread> threads;
        for (int i = 0; i < 8; i++) {
            threads.emplace_back([&] {
                vkp_conn *mine = vkp_conn_ref(link);
                vkp_conn_close(mine);
                vkp_conn_unref(mine);
            });
        }
        for (std::thread &thread : threads) {
            thread.join();
        }
        closed.get_future().get();
        CHECK_FALSE(vkp_conn_is_open(link));
        CHECK(push(link, "x", VKP_FOREVER) == VKP_ERR_CLOSED);
    }
    CHECK(link.end.closes == 1);
    CHECK(link.end.reason == VKP_CLOSE_LOCAL);
}

// ---- drain ----

TEST_CASE("conn: drain writes what is queued, reads no more, then closes")
{
    ON_EVERY_BACKEND;
    Loop loop(backend, wired());
    Link link;
    link.open(loop);
    SECTION("nothing queued")
    {
        vkp_conn_drain(link);
        CHECK(link.end.closes == 0); // the round's end closes
        loop.rounds(2);
        CHECK(link.end.closes == 1);
    }
    SECTION("pushes and answers queued")
    {
        wire.allowance = 0;
        CHECK(push(link, "push ") == VKP_OK);
        CHECK(send_text(link, "answer") == VKP_OK);
        loop.rounds(3);
        REQUIRE(link.peer->say("not read") == 8);
        vkp_conn_drain(link);
        vkp_conn_drain(link);
        CHECK(push(link, "too late") == VKP_ERR_CLOSED);
        CHECK(send_text(link, "too late") == VKP_ERR_CLOSED);
        loop.rounds(5);
        CHECK(link.end.closes == 0);
        CHECK(link.end.data.empty());
        wire.allowance = unlimited;
        hear_until(loop, link, "the close", [&] { return link.end.closes > 0; });
        CHECK(link.peer->hear() == "push answer");
    }
    SECTION("what was kept is not shown any more")
    {
        link.end.on_data = [](vkp_conn *conn, std::string_view) {
            vkp_conn_pause(conn);
            return size_t{0};
        };
        REQUIRE(link.peer->say("kept") == 4);
        vkp_test_run_until(loop, "data", [&] { return link.end.told.back() == "data"; });
        wire.allowance = 0;
        CHECK(push(link, "x") == VKP_OK);
        vkp_conn_drain(link);
        vkp_conn_resume(link);
        loop.rounds(3);
        CHECK(std::count(link.end.told.begin(), link.end.told.end(), "data") == 1);
        wire.allowance = unlimited;
        loop.rounds(5);
        CHECK(link.peer->hear() == "x");
        CHECK(link.end.closes == 1);
    }
    SECTION("in on_data")
    {
        link.end.on_data = [](vkp_conn *conn, std::string_view view) {
            CHECK(send_text(conn, "bye") == VKP_OK);
            vkp_conn_drain(conn);
            return view.size();
        };
        REQUIRE(link.peer->say("QUIT") == 4);
        hear_until(loop, link, "the close", [&] { return link.end.closes > 0; });
        CHECK(link.peer->hear() == "bye");
    }
    SECTION("a peer that is gone ends it")
    {
        wire.allowance = 0;
        CHECK(push(link, "x") == VKP_OK);
        loop.rounds(2);
        vkp_conn_drain(link);
        link.peer->shut();
        wire.allowance = unlimited;
        vkp_test_run_until(loop, "the close", [&] { return link.end.closes > 0; });
        CHECK(link.end.closes == 1);
        return;
    }
    loop.rounds(3);
    CHECK(link.end.closes == 1);
    CHECK(link.end.reason == VKP_CLOSE_LOCAL);
    CHECK(link.end.ends == 0);
}

TEST_CASE("conn: what other threads pushed before a drain is written")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Link link;
    link.open(loop);
    std::string expected;
    {
        Runner runner(loop);
        runner.stall();
        std::promise<void> closed;
        for (int i = 0; i < 20; i++) {
            CHECK(push(link, numbered(i), VKP_FOREVER) == VKP_OK);
        }
        link.end.on_close = [&](vkp_conn *) { closed.set_value(); };
        // Posted behind the pushes: the drain comes after them.
        REQUIRE(vkp_loop_post(
                    loop, [](void *conn) { vkp_conn_drain(static_cast<vkp_conn *>(conn)); },
                    link.end.conn) == VKP_OK);
        runner.go();
        closed.get_future().get();
        CHECK(push(link, "too late", VKP_FOREVER) == VKP_ERR_CLOSED);
    }
    CHECK(link.peer->hear() == numbers(0, 20));
    CHECK(link.end.reason == VKP_CLOSE_LOCAL);
}

TEST_CASE("conn: a drain called with other threads' pushes waiting behind a full queue")
{
    ON_EVERY_BACKEND;
    Loop loop(backend, wired());
    Link link;
    link.end.config.queue_frames = 4;
    link.open(loop);
    {
        Runner runner(loop);
        wire.allowance = 0;
        std::promise<void> closed;
        link.end.on_close = [&](vkp_conn *) { closed.set_value(); };
        for (int i = 0; i < 8; i++) {
            CHECK(push(link, numbered(i), VKP_FOREVER) == VKP_OK);
        }
        runner.call([&] { vkp_conn_drain(link); });
        CHECK(push(link, "too late", VKP_FOREVER) == VKP_ERR_CLOSED);
        wire.allowance = unlimited;
        closed.get_future().get();
    }
    CHECK(link.peer->hear() == numbers(0, 8));
    CHECK(link.end.closes == 1);
    CHECK(link.end.reason == VKP_CLOSE_LOCAL);
}

// ---- reading ----

TEST_CASE("conn: what on_data leaves comes again with more behind it")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Link link;
    std::vector<std::string> windows;
    std::vector<std::string> lines;
    link.end.on_data = [&](vkp_conn *, std::string_view view) {
        windows.emplace_back(view);
        size_t used = 0;
        for (size_t end = view.find('\n'); end != std::string_view::npos;
             end = view.find('\n', used)) {
            lines.emplace_back(view.substr(used, end - used));
            used = end + 1;
        }
        return used;
    };
    link.open(loop);
    SECTION("byte by byte")
    {
        const std::string text = "one\ntwo\n\nthree\n";
        for (char byte : text) {
            REQUIRE(link.peer->say({&byte, 1}) == 1);
            const size_t before = windows.size();
            vkp_test_run_until(loop, "a byte", [&] { return windows.size() > before; });
        }
        CHECK(windows.size() == text.size());
        CHECK(windows[0] == "o");
        CHECK(windows[1] == "on");
        CHECK(windows[3] == "one\n");
        CHECK(windows[4] == "t");
        CHECK(link.end.data == text);
    }
    SECTION("in lumps")
    {
        for (const char *text : {"one\ntw", "o\n\nthr", "ee\n"}) {
            REQUIRE(link.peer->say(text) == std::strlen(text));
            const size_t before = windows.size();
            vkp_test_run_until(loop, "a lump", [&] { return windows.size() > before; });
        }
        CHECK(windows[1] == "two\n\nthr");
    }
    CHECK(lines == std::vector<std::string>{"one", "two", "", "three"});
    CHECK(link.end.told.front() == "open");
}

TEST_CASE("conn: random windows and random use keep every byte in order")
{
    ON_EVERY_BACKEND;
    const size_t read_bytes = GENERATE(size_t{1024}, size_t{65536});
    Loop loop(backend, nullptr, read_bytes);
    Link link;
    std::mt19937 random(7);
    size_t rest = 0;
    bool rest_came_again = true;
    link.end.on_data = [&](vkp_conn *, std::string_view view) {
        rest_came_again = rest_came_again && view.size() > rest;
        const size_t used = random() % 4 == 0 ? 0 : random() % (view.size() + 1);
        rest = view.size() - used;
        return used;
    };
    link.open(loop);
    const std::string text = noise(300000);
    size_t said = 0;
    size_t seen = 0;
    while (said < text.size()) {
        const size_t some = std::min<size_t>(1 + random() % 9000, text.size() - said);
        said += link.peer->say(std::string_view(text).substr(said, some));
        loop.round();
        seen = link.end.data.size() + rest;
    }
    vkp_test_run_until(loop, "all bytes", [&] {
        seen = link.end.data.size() + rest;
        return seen == text.size();
    });
    CHECK(link.end.data == text.substr(0, link.end.data.size()));
    CHECK(rest_came_again);
}

TEST_CASE("conn: slices kept from on_data stay as they were")
{
    ON_EVERY_BACKEND;
    Loop loop(backend, nullptr, 1024);
    static std::vector<vkp_bytes> kept;
    kept.clear();
    vkp_conn_ops ops = {};
    ops.on_data = [](vkp_conn *, void *, const vkp_bytes *in) {
        kept.push_back(vkp_bytes_slice(in, 0, in->len / 2));
        return in->len / 2;
    };
    vkp_conn_config config = {};
    config.ops = &ops;
    int fds[2];
    vkp_test_socket_pair(fds);
    Peer peer(fds[1]);
    vkp_conn *conn = nullptr;
    REQUIRE(vkp_conn_open(loop, fds[0], &config, &conn) == VKP_OK);
    const std::string text = noise(20000);
    for (size_t said = 0; said < text.size();) {
        said += peer.say(std::string_view(text).substr(said, 333));
        loop.round();
    }
    loop.rounds(10);
    std::string together;
    for (vkp_bytes &bytes : kept) {
        together.append(reinterpret_cast<const char *>(bytes.data), bytes.len);
        vkp_bytes_unref(&bytes);
    }
    CHECK(together.size() > text.size() - 2048);
    CHECK(together == text.substr(0, together.size()));
    vkp_conn_close(conn);
    vkp_conn_unref(conn);
}

TEST_CASE("conn: a frame of some megabytes is gathered whole")
{
    ON_EVERY_BACKEND;
    Loop loop(backend, nullptr, GENERATE(size_t{0}, size_t{4096}));
    Link link;
    const std::string text = noise(5u << 20);
    link.end.on_data = [&](vkp_conn *, std::string_view view) {
        return view.size() < text.size() ? size_t{0} : view.size();
    };
    link.open(loop);
    size_t said = 0;
    vkp_test_run_until(loop, "the frame", [&] {
        said += link.peer->say(std::string_view(text).substr(said));
        return link.end.data.size() == text.size();
    });
    CHECK(link.end.data == text);
    // What was needed for it is given back.
    CHECK(loop.live_bytes() < (1u << 20));
    REQUIRE(link.peer->say("more") == 4);
}

TEST_CASE("conn: input that on_data never uses is bounded")
{
    ON_EVERY_BACKEND;
    Loop loop(backend, nullptr, 1024);
    Link link;
    link.end.config.input_bytes = 10000;
    link.end.on_data = [](vkp_conn *, std::string_view) { return size_t{0}; };
    link.open(loop);
    const std::string text = noise(10000);
    size_t said = 0;
    while (said < text.size()) {
        said += link.peer->say(std::string_view(text).substr(said));
        loop.round();
    }
    loop.rounds(20);
    CHECK(link.end.closes == 0); // exactly as many as are allowed
    REQUIRE(link.peer->say("1") == 1);
    vkp_test_run_until(loop, "the close", [&] { return link.end.closes > 0; });
    loop.rounds(3);
    CHECK(link.end.closes == 1);
    CHECK(link.end.reason == VKP_CLOSE_ERROR);
    CHECK(link.end.error != 0);
    CHECK(link.end.after_close == 0);
}

TEST_CASE("conn: pause stops reading, resume goes on with what was kept")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Link link;
    link.open(loop);
    SECTION("paused from outside")
    {
        vkp_conn_pause(link);
        vkp_conn_pause(link);
        REQUIRE(link.peer->say("later") == 5);
        loop.rounds(10);
        CHECK(link.end.data.empty());
        vkp_conn_resume(link);
        vkp_conn_resume(link);
        vkp_test_run_until(loop, "data", [&] { return link.end.data == "later"; });
    }
    SECTION("paused in on_data, with a rest")
    {
        link.end.on_data = [&](vkp_conn *conn, std::string_view view) {
            vkp_conn_pause(conn);
            return std::min<size_t>(2, view.size());
        };
        REQUIRE(link.peer->say("abcdef") == 6);
        vkp_test_run_until(loop, "data", [&] { return link.end.data == "ab"; });
        loop.rounds(5);
        CHECK(link.end.data == "ab");
        vkp_conn_resume(link);
        CHECK(link.end.data == "ab"); // not inside resume
        loop.round();                 // the next round, without another byte
        CHECK(link.end.data == "abcd");
        loop.rounds(5);
        CHECK(link.end.data == "abcd");
        vkp_conn_resume(link);
        loop.round();
        CHECK(link.end.data == "abcdef");
    }
    SECTION("resumed in on_data that paused")
    {
        int calls = 0;
        link.end.on_data = [&](vkp_conn *conn, std::string_view view) {
            if (calls++ == 0) {
                vkp_conn_pause(conn);
                vkp_conn_resume(conn);
                return size_t{1};
            }
            return view.size();
        };
        REQUIRE(link.peer->say("xyz") == 3);
        vkp_test_run_until(loop, "data", [&] { return link.end.data == "xyz"; });
    }
    SECTION("writing goes on while paused")
    {
        vkp_conn_pause(link);
        CHECK(push(link, "push") == VKP_OK);
        loop.rounds(2);
        CHECK(link.peer->hear() == "push");
    }
    SECTION("closed while paused")
    {
        vkp_conn_pause(link);
        vkp_conn_close(link);
        vkp_conn_resume(link);
        loop.rounds(2);
    }
    CHECK(link.end.after_close == 0);
}

TEST_CASE("conn: a hang-up while paused waits for the resume, and costs no rounds")
{
    const vkp_backend *backend = GENERATE(from_range([] {
        std::vector<const vkp_backend *> real;
        for (const vkp_backend *const *at = vkp_test_backends(); *at != nullptr; at++) {
            real.push_back(*at);
        }
        return real;
    }()));
    INFO("backend " << backend->name);
    Loop loop(backend);
    Link link;
    link.open(loop);
    vkp_conn_pause(link);
    REQUIRE(link.peer->say("before the end") == 14);
    link.peer->shut();
    vkp_timer timer = {};
    static bool fired;
    fired = false;
    REQUIRE(vkp_timer_start(
                &timer, loop, [](vkp_timer *) { fired = true; }, 0, vkp_after_ms(20)) == VKP_OK);
    int rounds = 0;
    for (; !fired; rounds++) {
        loop.round(vkp_test_deadline());
    }
    CHECK(rounds <= 3);
    CHECK(link.end.told == std::vector<std::string>{"open"});
    vkp_conn_resume(link);
    vkp_test_run_until(loop, "the close", [&] { return link.end.closes > 0; });
    CHECK(link.end.told == std::vector<std::string>{"open", "data", "end", "close"});
    CHECK(link.end.data == "before the end");
    CHECK(link.end.reason == VKP_CLOSE_PEER);
}

TEST_CASE("conn: what was kept is shown before the end of the stream")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Link link;
    Link other;
    bool pausing = true;
    int calls = 0;
    link.end.on_data = [&](vkp_conn *conn, std::string_view view) {
        if (pausing) {
            vkp_conn_pause(conn);
            return size_t{0};
        }
        return view.size();
    };
    link.open(loop);
    other.open(loop);
    REQUIRE(link.peer->say("kept") == 4);
    vkp_test_run_until(loop, "data", [&] { return link.end.told.back() == "data"; });
    pausing = false;
    SECTION("resumed between two rounds")
    {
        link.peer->shut();
        loop.rounds(2);
        vkp_conn_resume(link);
    }
    SECTION("resumed from another connection's callback")
    {
        other.end.on_data = [&](vkp_conn *, std::string_view view) {
            vkp_conn_resume(link);
            return view.size();
        };
        REQUIRE(other.peer->say("go") == 2);
        link.peer->shut();
    }
    SECTION("with more behind it")
    {
        REQUIRE(link.peer->say(" and more") == 9);
        link.peer->shut();
        vkp_conn_resume(link);
    }
    SECTION("and paused again on the way")
    {
        link.peer->shut();
        link.end.on_data = [&](vkp_conn *conn, std::string_view) {
            if (++calls < 4) {
                vkp_conn_pause(conn);
                vkp_conn_resume(conn);
            }
            return size_t{1};
        };
        vkp_conn_resume(link);
    }
    vkp_test_run_until(loop, "the close", [&] { return link.end.closes > 0; });
    CHECK(link.end.data.substr(0, 4) == "kept");
    CHECK(link.end.ends == 1);
    CHECK(link.end.reason == VKP_CLOSE_PEER);
    CHECK(link.end.after_close == 0);
}

TEST_CASE("conn: reads that fail")
{
    ON_EVERY_BACKEND;
    static int fault;
    static int left;
    vkp_sys sys = *vkp_sys_get_default();
    sys.read = [](int fd, void *buffer, size_t bytes) {
        int type = 0;
        socklen_t size = sizeof type;
        if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && left > 0) {
            left--;
            return static_cast<int64_t>(-fault);
        }
        return vkp_sys_get_default()->read(fd, buffer, bytes);
    };
    left = 0;
    Loop loop(backend, &sys);
    Link link;
    link.open(loop);
    REQUIRE(link.peer->say("data") == 4);
    left = 3;
    SECTION("for the moment")
    {
        fault = GENERATE(EINTR, EAGAIN);
        vkp_test_run_until(loop, "data", [&] { return link.end.data == "data"; });
        CHECK(left == 0);
        CHECK(link.end.closes == 0);
    }
    SECTION("for good")
    {
        fault = EIO;
        vkp_test_run_until(loop, "the close", [&] { return link.end.closes > 0; });
        CHECK(link.end.closes == 1);
        CHECK(link.end.reason == VKP_CLOSE_ERROR);
        CHECK(link.end.error == EIO);
        CHECK(link.end.data.empty());
    }
    CHECK(link.end.ends == 0);
}

// ---- writing ----

TEST_CASE("conn: pushes and answers go out in the order given, in one write, at the round's end")
{
    ON_EVERY_BACKEND;
    Loop loop(backend, wired());
    Link link;
    link.open(loop);
    std::string expected;
    for (int i = 0; i < 20; i++) {
        CHECK((i % 3 == 0 ? send_text(link, numbered(i)) : push(link, numbered(i))) == VKP_OK);
        expected += numbered(i);
    }
    CHECK(wire.calls == 0);
    CHECK(link.end.stats().queued_bytes == expected.size());
    loop.round();
    CHECK(wire.calls == 1);
    CHECK(wire.ranges == 20);
    CHECK(link.peer->hear() == expected);
    CHECK(link.end.stats().queued_bytes == 0);
    CHECK(link.end.stats().queued_frames == 0);
    CHECK(link.end.drains == 0); // nothing had to wait
}

TEST_CASE("conn: empty frames and static bytes")
{
    Loop loop(&vkp_backend_poll, wired());
    Link link;
    link.open(loop);
    const vkp_bytes nothing = vkp_bytes_static(nullptr, 0);
    const vkp_bytes text = vkp_bytes_static("static", 6);
    CHECK(vkp_conn_push(link, &nothing, 0) == VKP_OK);
    CHECK(vkp_conn_send(link, &nothing) == VKP_OK);
    loop.round();
    CHECK(wire.calls == 0);
    CHECK(vkp_conn_push(link, &text, 0) == VKP_OK);
    CHECK(vkp_conn_send(link, &text) == VKP_OK);
    loop.round();
    CHECK(link.peer->hear() == "staticstatic");
    CHECK(vkp_conn_push(nullptr, &text, 0) == VKP_ERR_INVALID);
    CHECK(vkp_conn_push(link, nullptr, 0) == VKP_ERR_INVALID);
    CHECK(vkp_conn_send(nullptr, &text) == VKP_ERR_INVALID);
    CHECK(vkp_conn_send(link, nullptr) == VKP_ERR_INVALID);
}

TEST_CASE("conn: neighbouring frames of one block are one range")
{
    Loop loop(&vkp_backend_poll, wired());
    const int count = 200;
    const std::string text = numbers(0, count);
    const Sliced block(text, numbered_bytes);
    SECTION("pushes, when frame_len finds them again")
    {
        Link link(true);
        link.open(loop);
        for (int i = 0; i < count; i++) {
            CHECK(block.push(link, i) == VKP_OK);
        }
        CHECK(link.end.stats().queued_frames == count);
        loop.round();
        CHECK(wire.calls == 1);
        CHECK(wire.ranges == 1);
        CHECK(link.peer->hear() == text);
        CHECK(link.end.stats().queued_frames == 0);
    }
    SECTION("pushes are not without it: 64 ranges are one write")
    {
        Link link;
        link.open(loop);
        for (int i = 0; i < count; i++) {
            CHECK(block.push(link, i) == VKP_OK);
        }
        loop.round();
        CHECK(wire.calls == 4);
        CHECK(wire.ranges == count);
        CHECK(link.peer->hear() == text);
    }
    SECTION("answers are")
    {
        Link link;
        link.open(loop);
        for (int i = 0; i < count; i++) {
            CHECK(block.send(link, i) == VKP_OK);
        }
        loop.round();
        CHECK(wire.calls == 1);
        CHECK(wire.ranges == 1);
        CHECK(link.peer->hear() == text);
    }
    SECTION("an answer between two pushes keeps them apart")
    {
        Link link(true);
        link.open(loop);
        CHECK(block.push(link, 0) == VKP_OK);
        CHECK(block.send(link, 1) == VKP_OK);
        CHECK(block.push(link, 2) == VKP_OK);
        loop.round();
        CHECK(wire.ranges == 3);
        CHECK(link.peer->hear() == numbers(0, 3));
    }
    SECTION("a gap keeps them apart")
    {
        Link link(true);
        link.open(loop);
        for (int i = 0; i < 6; i++) {
            CHECK(block.push(link, 2 * i) == VKP_OK);
        }
        loop.round();
        CHECK(wire.ranges == 6);
    }
}

TEST_CASE("conn: partial writes, interrupted writes and full buffers keep every byte in order")
{
    ON_EVERY_BACKEND;
    const bool merges = GENERATE(false, true);
    Loop loop(backend, wired());
    Link link(merges);
    link.open(loop);
    std::mt19937 random(3);
    wire.script = [&](size_t offered) -> int64_t {
        switch (random() % 5) {
        case 0:
            return -EINTR;
        case 1:
            return -EAGAIN;
        case 2:
            return 1;
        default:
            return static_cast<int64_t>(1 + random() % (offered + 1));
        }
    };
    const std::string text = numbers(0, 3000);
    const Sliced block(text, numbered_bytes);
    size_t given = 0;
    while (given < 3000) {
        for (size_t burst = random() % 40; burst > 0 && given < 3000; burst--, given++) {
            CHECK((random() % 4 == 0 ? block.send(link, given) : block.push(link, given)) ==
                  VKP_OK);
        }
        loop.round();
    }
    hear_until(loop, link, "all frames", [&] { return link.peer->heard.size() == text.size(); });
    CHECK(link.peer->heard == text);
    CHECK(link.end.stats().queued_bytes == 0);
    CHECK(link.end.stats().queued_frames == 0);
    CHECK(link.end.closes == 0);
    CHECK(link.end.drains > 0);
}

TEST_CASE("conn: on_drain comes once per wait, when the queue is empty")
{
    ON_EVERY_BACKEND;
    Loop loop(backend, wired());
    Link link;
    size_t queued = SIZE_MAX;
    link.end.on_drain = [&](vkp_conn *) { queued = link.end.stats().queued_bytes; };
    link.open(loop);
    CHECK(push(link, "at once") == VKP_OK);
    loop.rounds(3);
    CHECK(link.end.drains == 0);
    for (int wait = 1; wait <= 3; wait++) {
        wire.allowance = 3;
        CHECK(push(link, "waits a while") == VKP_OK);
        loop.rounds(5);
        CHECK(link.end.drains == wait - 1);
        wire.allowance = 4; // and a little more, not all
        loop.rounds(5);
        CHECK(link.end.drains == wait - 1);
        wire.allowance = unlimited;
        loop.rounds(5);
        CHECK(link.end.drains == wait);
        CHECK(queued == 0);
    }
    SECTION("what on_drain pushes goes out too")
    {
        link.end.on_drain = [&](vkp_conn *conn) { CHECK(push(conn, "more") == VKP_OK); };
        wire.allowance = 0;
        CHECK(push(link, "x") == VKP_OK);
        loop.rounds(2);
        wire.allowance = unlimited;
        loop.rounds(5);
        CHECK(link.end.drains == 4);
        const std::string &heard = link.peer->hear();
        CHECK(heard.substr(heard.size() - 5) == "xmore");
    }
}

TEST_CASE("conn: megabytes through a small buffer to a peer that reads in bits")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Link link;
    link.open(loop, 4096);
    const std::string text = noise(3u << 20);
    const Sliced block(text, 100000);
    for (size_t i = 0; i * 100000 < text.size(); i++) {
        CHECK(block.send(link, i) == VKP_OK);
    }
    vkp_test_run_until(loop, "all of it",
                       [&] { return link.peer->hear(30000).size() == text.size(); });
    CHECK(link.peer->heard == text);
    loop.rounds(3);
    CHECK(link.end.drains == 1);
}

TEST_CASE("conn: a write that fails closes with its error, at the round's end")
{
    ON_EVERY_BACKEND;
    Loop loop(backend, wired());
    Link link;
    link.open(loop);
    wire.script = [](size_t) { return -EPIPE; };
    CHECK(push(link, "x") == VKP_OK);
    CHECK(link.end.closes == 0);
    loop.rounds(2);
    CHECK(link.end.closes == 1);
    CHECK(link.end.reason == VKP_CLOSE_ERROR);
    CHECK(link.end.error == EPIPE);
}

TEST_CASE("conn: a push on the loop's thread tells no callback before the round's end")
{
    // A program that pushes to many walks a list; a close in the middle would change the list.
    Loop loop(&vkp_backend_poll, wired());
    Link link;
    link.end.config.queue_frames = 1;
    link.end.config.on_full = GENERATE(VKP_ON_FULL_DISCONNECT, VKP_ON_FULL_DROP_OLDEST);
    link.open(loop);
    wire.script = [](size_t) { return -EPIPE; };
    CHECK(push(link, "a") == VKP_OK);
    CHECK(push(link, "b") == VKP_ERR_CLOSED); // looked for room by writing, and met the error
    CHECK(link.end.closes == 0);
    loop.rounds(2);
    CHECK(link.end.closes == 1);
    CHECK(link.end.reason == VKP_CLOSE_ERROR);
}

// ---- a full queue, on the loop's thread ----

TEST_CASE("conn: a full queue of frames: who is told what, and what arrives")
{
    ON_EVERY_BACKEND;
    const bool merges = GENERATE(false, true);
    INFO("merging " << merges);
    Loop loop(backend, wired());
    Link link(merges);
    link.end.config.queue_frames = 5;
    const std::string text = numbers(0, 9);
    const Sliced block(text, numbered_bytes);
    wire.allowance = 0;
    std::vector<vkp_status> results;
    auto push_all = [&](vkp_on_full policy) {
        link.end.config.on_full = policy;
        link.open(loop);
        for (size_t i = 0; i < 9; i++) {
            results.push_back(block.push(link, i));
            if (i % 2 == 0) {
                loop.round();
            }
        }
    };
    auto all = [&](size_t from, size_t until, vkp_status status) {
        return std::all_of(results.begin() + static_cast<long>(from),
                           results.begin() + static_cast<long>(until),
                           [&](vkp_status one) { return one == status; });
    };
    std::string expected;
    uint64_t dropped = 0;
    SECTION("wait")
    {
        push_all(VKP_ON_FULL_WAIT);
        CHECK(all(0, 5, VKP_OK));
        CHECK(all(5, 9, VKP_ERR_FULL));
        expected = numbers(0, 5);
    }
    SECTION("error")
    {
        push_all(VKP_ON_FULL_ERROR);
        CHECK(all(0, 5, VKP_OK));
        CHECK(all(5, 9, VKP_ERR_FULL));
        expected = numbers(0, 5);
    }
    SECTION("drop newest")
    {
        push_all(VKP_ON_FULL_DROP_NEWEST);
        CHECK(all(0, 5, VKP_OK));
        CHECK(all(5, 9, VKP_ERR_DROPPED));
        expected = numbers(0, 5);
        dropped = 4;
    }
    SECTION("drop oldest")
    {
        push_all(VKP_ON_FULL_DROP_OLDEST);
        CHECK(all(0, 9, VKP_OK));
        expected = numbers(4, 9);
        dropped = 4;
    }
    SECTION("disconnect")
    {
        push_all(VKP_ON_FULL_DISCONNECT);
        CHECK(all(0, 5, VKP_OK));
        CHECK(all(5, 9, VKP_ERR_CLOSED));
        loop.rounds(2);
        CHECK(link.end.closes == 1);
        CHECK(link.end.reason == VKP_CLOSE_SLOW);
        link.peer->hear();
        CHECK(link.peer->ended);
        return;
    }
    CHECK(link.end.stats().queued_frames == 5);
    CHECK(link.end.stats().queued_bytes == 5 * numbered_bytes);
    CHECK(link.end.stats().dropped_frames == dropped);
    wire.allowance = unlimited;
    loop.rounds(3);
    CHECK(link.peer->hear() == expected);
    CHECK(link.end.closes == 0);
    CHECK(push(link, "room again") == VKP_OK);
}

TEST_CASE("conn: a full queue of bytes, in which one frame always fits")
{
    ON_EVERY_BACKEND;
    Loop loop(backend, wired());
    Link link;
    link.end.config.queue_bytes = 100;
    wire.allowance = 0;
    const std::string big(150, 'B');
    const std::string half(50, 'h');
    SECTION("error")
    {
        link.end.config.on_full = VKP_ON_FULL_ERROR;
        link.open(loop);
        CHECK(push(link, big) == VKP_OK);
        CHECK(push(link, "1") == VKP_ERR_FULL);
        wire.allowance = unlimited;
        loop.rounds(3);
        CHECK(link.peer->hear() == big);
        wire.allowance = 0;
        CHECK(push(link, half) == VKP_OK);
        CHECK(push(link, half) == VKP_OK); // to the last byte
        CHECK(push(link, "1") == VKP_ERR_FULL);
        CHECK(push(link, big) == VKP_ERR_FULL);
        wire.allowance = unlimited;
        loop.rounds(3);
        CHECK(link.peer->hear() == big + half + half);
    }
    SECTION("drop oldest makes as much room as is needed, not more")
    {
        link.end.config.on_full = VKP_ON_FULL_DROP_OLDEST;
        link.open(loop);
        for (const char *text : {"aaaaaaaaaa", "bbbbbbbbbb", "cccccccccc", "dddddddddd"}) {
            CHECK(push(link, text) == VKP_OK);
        }
        CHECK(push(link, std::string(75, 'x')) == VKP_OK);
        CHECK(link.end.stats().dropped_frames == 2);
        CHECK(link.end.stats().queued_bytes == 95);
        wire.allowance = unlimited;
        loop.rounds(3);
        CHECK(link.peer->hear() == "ccccccccccdddddddddd" + std::string(75, 'x'));
    }
    SECTION("drop oldest: a frame larger than all stands alone")
    {
        link.end.config.on_full = VKP_ON_FULL_DROP_OLDEST;
        link.open(loop);
        CHECK(push(link, half) == VKP_OK);
        CHECK(push(link, half) == VKP_OK);
        CHECK(push(link, big) == VKP_OK);
        CHECK(link.end.stats().dropped_frames == 2);
        wire.allowance = unlimited;
        loop.rounds(3);
        CHECK(link.peer->hear() == big);
    }
}

TEST_CASE("conn: room is looked for by writing first")
{
    Loop loop(&vkp_backend_poll, wired());
    Link link;
    link.end.config.queue_frames = 3;
    link.end.config.on_full = GENERATE(VKP_ON_FULL_WAIT, VKP_ON_FULL_ERROR, VKP_ON_FULL_DROP_NEWEST,
                                       VKP_ON_FULL_DROP_OLDEST, VKP_ON_FULL_DISCONNECT);
    link.open(loop);
    for (int i = 0; i < 20; i++) {
        CHECK(push(link, numbered(i)) == VKP_OK); // all in one callback, so to speak
    }
    loop.round();
    CHECK(link.peer->hear() == numbers(0, 20));
    CHECK(link.end.stats().dropped_frames == 0);
}

TEST_CASE("conn: answers are never dropped, counted or refused")
{
    ON_EVERY_BACKEND;
    const vkp_on_full policy =
        GENERATE(VKP_ON_FULL_ERROR, VKP_ON_FULL_DROP_NEWEST, VKP_ON_FULL_DROP_OLDEST);
    Loop loop(backend, wired());
    Link link(GENERATE(false, true));
    link.end.config.queue_frames = 3;
    link.end.config.queue_bytes = 1000;
    link.end.config.on_full = policy;
    link.open(loop);
    wire.allowance = 0;
    for (int i = 0; i < 10; i++) {
        CHECK(send_text(link, "+" + std::string(500, 'A' + static_cast<char>(i)) + "\r\n") ==
              VKP_OK);
        (void)push(link, numbered(i));
        loop.round();
    }
    CHECK(link.end.stats().queued_frames == 3);
    CHECK(link.end.stats().queued_bytes == 10 * 503 + 3 * numbered_bytes);
    wire.allowance = unlimited;
    hear_until(loop, link, "all of it", [&] { return link.end.stats().queued_bytes == 0; });
    std::string expected;
    for (int i = 0; i < 10; i++) {
        expected += "+" + std::string(500, 'A' + static_cast<char>(i)) + "\r\n";
        if (policy == VKP_ON_FULL_DROP_OLDEST ? i >= 7 : i < 3) {
            expected += numbered(i);
        }
    }
    CHECK(link.peer->hear() == expected);
}

TEST_CASE("conn: drop oldest keeps exactly the newest whole frames, wherever the write stopped")
{
    // The head is half written at every possible byte, in merged spans and in single ones.
    const bool merges = GENERATE(false, true);
    const bool by_bytes = GENERATE(false, true);
    const int total = 12;
    const int keep = 4;
    const std::string text = numbers(0, total);
    for (size_t written = 0; written <= 4 * numbered_bytes; written++) {
        INFO("merging " << merges << ", by bytes " << by_bytes << ", written " << written);
        Loop loop(&vkp_backend_null, wired());
        Link link(merges);
        link.end.config.on_full = VKP_ON_FULL_DROP_OLDEST;
        (by_bytes ? link.end.config.queue_bytes : link.end.config.queue_frames) =
            by_bytes ? keep * numbered_bytes : keep;
        link.open(loop);
        const Sliced block(text, numbered_bytes);
        wire.allowance = static_cast<int64_t>(written);
        for (size_t i = 0; i < keep; i++) {
            REQUIRE(block.push(link, i) == VKP_OK);
        }
        loop.round();
        for (size_t i = keep; i < total; i++) {
            REQUIRE(block.push(link, i) == VKP_OK);
        }
        // A frame that was begun is finished; it is no longer one that could be dropped.
        const size_t begun = (written + numbered_bytes - 1) / numbered_bytes;
        const size_t torn = written % numbered_bytes;
        REQUIRE(link.end.stats().dropped_frames == total - keep - begun);
        REQUIRE(link.end.stats().queued_frames == keep);
        REQUIRE(link.end.stats().queued_bytes ==
                keep * numbered_bytes + (torn > 0 ? numbered_bytes - torn : 0));
        wire.allowance = unlimited;
        loop.rounds(3);
        REQUIRE(link.peer->hear() ==
                numbers(0, static_cast<int>(begun)) + numbers(total - keep, total));
        REQUIRE(link.end.stats().queued_frames == 0);
    }
}

TEST_CASE("conn: frames are never torn, whatever is written, dropped and answered")
{
    const bool merges = GENERATE(false, true);
    std::mt19937 random(merges ? 11 : 12);
    for (int run = 0; run < 60; run++) {
        INFO("merging " << merges << ", run " << run);
        Loop loop(&vkp_backend_null, wired());
        Link link(merges);
        link.end.config.on_full = VKP_ON_FULL_DROP_OLDEST;
        link.end.config.queue_frames = 1 + random() % 20;
        link.open(loop);
        const int total = 400;
        const std::string text = numbers(0, total);
        const Sliced block(text, numbered_bytes);
        std::vector<bool> answered(total);
        for (int i = 0; i < total; i++) {
            answered[static_cast<size_t>(i)] = random() % 10 == 0;
            REQUIRE((answered[static_cast<size_t>(i)]
                         ? block.send(link, static_cast<size_t>(i))
                         : block.push(link, static_cast<size_t>(i))) == VKP_OK);
            if (random() % 3 == 0) {
                wire.allowance = static_cast<int64_t>(random() % 60);
                loop.round();
            }
            REQUIRE(link.end.stats().queued_frames <= link.end.config.queue_frames + 1);
        }
        wire.allowance = unlimited;
        hear_until(loop, link, "the rest", [&] { return link.end.stats().queued_bytes == 0; });
        const std::string &heard = link.peer->heard;
        REQUIRE(heard.size() % numbered_bytes == 0);
        const int got = static_cast<int>(heard.size() / numbered_bytes);
        int last = -1;
        std::vector<bool> arrived(total);
        for (int i = 0; i < got; i++) {
            const std::string frame =
                heard.substr(static_cast<size_t>(i) * numbered_bytes, numbered_bytes);
            const int number = std::stoi(frame.substr(8, 6));
            REQUIRE(frame == numbered(number));
            REQUIRE(number > last);
            last = number;
            arrived[static_cast<size_t>(number)] = true;
        }
        for (size_t i = 0; i < answered.size(); i++) {
            REQUIRE((arrived[i] || !answered[i]));
        }
        REQUIRE(got + static_cast<int>(link.end.stats().dropped_frames) == total);
    }
}

TEST_CASE("conn: no memory to set a torn frame apart: nothing is torn, and the caller is told")
{
    Loop loop(&vkp_backend_null, wired());
    Link link(true);
    link.end.config.on_full = VKP_ON_FULL_DROP_OLDEST;
    link.end.config.queue_frames = 4;
    link.end.config.loop_only = true;
    link.open(loop);
    const std::string text = numbers(0, 6);
    const Sliced block(text, numbered_bytes);
    wire.allowance = 5;
    for (size_t i = 0; i < 4; i++) {
        REQUIRE(block.push(link, i) == VKP_OK);
    }
    loop.round();
    loop.fault(VKP_TEST_FAULT_FROM, 1);
    CHECK(block.push(link, 4) == VKP_ERR_NOMEM);
    loop.fault(VKP_TEST_FAULT_NONE, 0);
    CHECK(link.end.stats().dropped_frames == 0);
    CHECK(block.push(link, 4) == VKP_OK);
    wire.allowance = unlimited;
    loop.rounds(3);
    CHECK(link.peer->hear() == numbers(0, 5));
}

// ---- a full queue, from other threads ----

TEST_CASE("conn: a full inbox: who is told what, and what arrives")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Link link;
    link.end.config.queue_frames = 5;
    auto push_all = [&](vkp_on_full policy, std::vector<vkp_status> &results) {
        link.end.config.on_full = policy;
        link.open(loop);
        Runner runner(loop);
        runner.stall();
        for (int i = 0; i < 9; i++) {
            results.push_back(push(link, numbered(i), 0));
        }
        runner.go();
        runner.call([] {}); // the round after the pushes' arrival wrote them
    };
    auto expect = [](int count, vkp_status status, int more, vkp_status other) {
        std::vector<vkp_status> all(static_cast<size_t>(count), status);
        all.insert(all.end(), static_cast<size_t>(more), other);
        return all;
    };
    std::vector<vkp_status> results;
    std::string expected;
    uint64_t dropped = 0;
    SECTION("wait: until the deadline")
    {
        push_all(VKP_ON_FULL_WAIT, results);
        CHECK(results == expect(5, VKP_OK, 4, VKP_ERR_TIMEOUT));
        expected = numbers(0, 5);
    }
    SECTION("error")
    {
        push_all(VKP_ON_FULL_ERROR, results);
        CHECK(results == expect(5, VKP_OK, 4, VKP_ERR_FULL));
        expected = numbers(0, 5);
    }
    SECTION("drop newest")
    {
        push_all(VKP_ON_FULL_DROP_NEWEST, results);
        CHECK(results == expect(5, VKP_OK, 4, VKP_ERR_DROPPED));
        expected = numbers(0, 5);
        dropped = 4;
    }
    SECTION("drop oldest")
    {
        push_all(VKP_ON_FULL_DROP_OLDEST, results);
        CHECK(results == expect(9, VKP_OK, 0, VKP_OK));
        expected = numbers(4, 9);
        dropped = 4;
    }
    SECTION("disconnect")
    {
        push_all(VKP_ON_FULL_DISCONNECT, results);
        CHECK(results == expect(5, VKP_OK, 4, VKP_ERR_CLOSED));
        CHECK(link.end.closes == 1);
        CHECK(link.end.reason == VKP_CLOSE_SLOW);
        return;
    }
    loop.rounds(3);
    CHECK(link.end.stats().dropped_frames == dropped);
    CHECK(link.peer->hear() == expected);
    CHECK(link.end.closes == 0);
}

TEST_CASE("conn: what other threads' pushes were told is what the peer gets, by every policy")
{
    // The peer reads nothing at first, so that both queues fill; then everything.
    ON_EVERY_BACKEND;
    const vkp_on_full policy = GENERATE(VKP_ON_FULL_WAIT, VKP_ON_FULL_ERROR,
                                        VKP_ON_FULL_DROP_NEWEST, VKP_ON_FULL_DROP_OLDEST);
    const bool by_bytes = GENERATE(false, true);
    INFO("policy " << policy << ", by bytes " << by_bytes);
    Loop loop(backend, wired());
    Link link;
    link.end.config.on_full = policy;
    (by_bytes ? link.end.config.queue_bytes : link.end.config.queue_frames) = by_bytes ? 250 : 7;
    link.open(loop);
    std::vector<std::string> accepted;
    size_t refused = 0;
    {
        Runner runner(loop);
        wire.allowance = 10; // the first frame is begun
        for (int i = 0; i < 60; i++) {
            // Sizes that do not divide the budget: the queue is full with a little room left.
            const std::string frame = numbered(i, 6 + static_cast<size_t>(i) * 37 % 100);
            const vkp_status status = push(link, frame, 0);
            if (status == VKP_OK) {
                accepted.push_back(frame);
            } else {
                refused++;
                CHECK(status == (policy == VKP_ON_FULL_WAIT          ? VKP_ERR_TIMEOUT
                                 : policy == VKP_ON_FULL_DROP_NEWEST ? VKP_ERR_DROPPED
                                                                     : VKP_ERR_FULL));
            }
            if (i % 4 == 0) {
                runner.call([] {});
            }
        }
        runner.call([] {});
        wire.allowance = unlimited;
        // Done once the loop has nothing left: two calls apart, so that the inbox was looked at.
        for (bool empty = false; !empty;) {
            runner.call([&] {
                link.peer->hear();
                empty = link.end.stats().queued_bytes == 0;
            });
        }
        const vkp_status status = push(link, "+end\r\n", VKP_FOREVER);
        CHECK(status == VKP_OK);
        for (bool there = false; !there;) {
            runner.call([&] {
                const std::string &heard = link.peer->hear();
                there = heard.size() >= 6 && heard.substr(heard.size() - 6) == "+end\r\n";
            });
        }
    }
    const std::string heard = link.peer->hear();
    std::string all;
    for (const std::string &frame : accepted) {
        all += frame;
    }
    const uint64_t dropped = link.end.stats().dropped_frames;
    switch (policy) {
    case VKP_ON_FULL_WAIT:
    case VKP_ON_FULL_ERROR:
        CHECK(refused > 0);
        CHECK(dropped == 0);
        CHECK(heard == all + "+end\r\n");
        break;
    default: {
        // Everything accepted arrived whole and in order, or was counted; what is missing is known.
        size_t at = 0;
        size_t got = 0;
        for (const std::string &frame : accepted) {
            if (heard.compare(at, frame.size(), frame) == 0) {
                at += frame.size();
                got++;
            }
        }
        CHECK(heard.substr(at) == "+end\r\n");
        CHECK(got + dropped == accepted.size() + refused);
        CHECK(dropped > 0);
        if (policy == VKP_ON_FULL_DROP_OLDEST) {
            CHECK(refused == 0);
            CHECK(heard.find(accepted.back()) != std::string::npos);
        }
    }
    }
}

TEST_CASE("conn: threads that push with back-pressure lose nothing and keep their order")
{
    ON_EVERY_BACKEND;
    const bool by_bytes = GENERATE(false, true);
    Loop loop(backend);
    Link link;
    (by_bytes ? link.end.config.queue_bytes : link.end.config.queue_frames) = by_bytes ? 400 : 8;
    link.open(loop, 4096);
    constexpr int threads = 4;
    constexpr int each = 1500;
    std::atomic<int> failed{0};
    std::vector<std::thread> pushers;
    std::string heard;
    {
        Runner runner(loop);
        for (int t = 0; t < threads; t++) {
            pushers.emplace_back([&, t] {
                for (int i = 0; i < each; i++) {
                    failed += push(link, numbered(t * 100000 + i), VKP_FOREVER) != VKP_OK;
                }
            });
        }
        // This thread is the peer.
        while (heard.size() < threads * each * numbered_bytes) {
            char buffer[4096];
            const ssize_t got = read(link.peer->fd(), buffer, sizeof buffer);
            if (got > 0) {
                heard.append(buffer, static_cast<size_t>(got));
            } else {
                std::this_thread::yield();
            }
        }
        for (std::thread &pusher : pushers) {
            pusher.join();
        }
    }
    CHECK(failed.load() == 0);
    std::vector<int> next(threads);
    for (size_t at = 0; at < heard.size(); at += numbered_bytes) {
        const int number = std::stoi(heard.substr(at + 8, 6));
        REQUIRE(heard.substr(at, numbered_bytes) == numbered(number));
        REQUIRE(number % 100000 == next[static_cast<size_t>(number / 100000)]);
        next[static_cast<size_t>(number / 100000)]++;
    }
    CHECK(link.end.stats().dropped_frames == 0);
}

TEST_CASE("conn: a close ends the waits of other threads")
{
    ON_EVERY_BACKEND;
    Loop loop(backend, wired());
    Link link;
    link.end.config.queue_frames = 2;
    link.open(loop);
    std::vector<std::thread> threads;
    std::vector<vkp_status> results(6, VKP_OK);
    {
        Runner runner(loop);
        wire.allowance = 0;
        for (size_t i = 0; i < results.size(); i++) {
            // Only four fit, so that at least two wait, and all go on until the close.
            threads.emplace_back([&, i] {
                while (results[i] == VKP_OK) {
                    results[i] = push(link, numbered(static_cast<int>(i)), VKP_FOREVER);
                }
            });
        }
        SECTION("on the loop's thread")
        {
            runner.call([&] { vkp_conn_close(link); });
        }
        SECTION("from this one")
        {
            vkp_conn_close(link);
        }
        SECTION("by the peer")
        {
            link.peer->shut();
        }
        for (std::thread &thread : threads) {
            thread.join();
        }
    }
    for (vkp_status result : results) {
        CHECK(result == VKP_ERR_CLOSED);
    }
    CHECK(link.end.closes == 1);
}

TEST_CASE("conn: a connection of the loop's thread alone has no inbox")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Link link;
    link.end.config.loop_only = true;
    link.open(loop);
    const size_t bytes = loop.live_bytes();
    Link other;
    other.open(loop);
    CHECK(loop.live_bytes() - bytes >= 200);
    {
        Runner runner(loop);
        CHECK(push(link, "x", 0) == VKP_ERR_INVALID);
        vkp_status status = VKP_ERR_INVALID;
        runner.call([&] { status = push(link, "y", 0); });
        CHECK(status == VKP_OK);
        vkp_conn_close(link); // this may come from anywhere
        while (vkp_conn_is_open(link)) {
            runner.call([] {});
        }
    }
    CHECK(link.peer->hear() == "y");
    CHECK(link.end.reason == VKP_CLOSE_LOCAL);
}

TEST_CASE("conn: sending is the loop's thread's alone")
{
    Loop loop(&vkp_backend_poll);
    Link link;
    link.open(loop);
    Runner runner(loop);
    CHECK(send_text(link, "x") == VKP_ERR_INVALID);
}

TEST_CASE("conn: the loop's end while other threads push")
{
    ON_EVERY_BACKEND;
    for (int run = 0; run < 10; run++) {
        Loop loop(backend);
        Link link;
        link.end.config.queue_frames = 16;
        link.open(loop);
        std::vector<std::thread> threads;
        std::atomic<int> wrong{0};
        {
            Runner runner(loop);
            for (int t = 0; t < 3; t++) {
                threads.emplace_back([&] {
                    vkp_conn *mine = vkp_conn_ref(link);
                    vkp_status status = VKP_OK;
                    while (status == VKP_OK) {
                        status = push(mine, "xxxxxxxxxxxxxxxx", VKP_FOREVER);
                    }
                    wrong += status != VKP_ERR_CLOSED;
                    vkp_conn_unref(mine);
                });
            }
            runner.call([&] { link.peer->hear(); });
            vkp_conn_close(link);
            for (std::thread &thread : threads) {
                thread.join();
            }
        }
        loop.close();
        CHECK(wrong.load() == 0);
        CHECK(link.end.closes == 1);
    }
}

// ---- memory ----

TEST_CASE("conn: what a slow peer pins is bounded by its budget")
{
    // Frames are slices of large blocks, as a relay's are: each block would stay for a few bytes.
    const bool merges = GENERATE(false, true);
    const bool answers = GENERATE(false, true);
    INFO("merging " << merges << ", answers " << answers);
    Loop loop(&vkp_backend_null, wired());
    Link link(merges);
    link.end.config.queue_frames = 500;
    link.end.config.queue_bytes = 20000;
    link.end.config.on_full = VKP_ON_FULL_DROP_OLDEST;
    link.end.config.loop_only = true;
    link.open(loop);
    wire.allowance = 0;
    CHECK(push(link, numbered(0)) == VKP_OK);
    loop.round();
    const size_t before = loop.live_bytes();
    const std::string large(65536 - numbered_bytes, 'z');
    for (int i = 1; i <= 2000; i++) {
        const Sliced block(numbered(i) + large, numbered_bytes, &loop.test.env);
        REQUIRE((answers && i <= 500 ? block.send(link, 0) : block.push(link, 0)) == VKP_OK);
        loop.round();
    }
    // The frames themselves, a ring of spans, a header per block, and the last large block.
    const size_t frames = link.end.stats().queued_bytes;
    INFO("pinned " << loop.live_bytes() - before << " for " << frames << " bytes");
    CHECK(loop.live_bytes() - before < 3 * 65536 + frames + 1000 * 200);
    wire.allowance = unlimited;
    loop.rounds(30);
    std::string heard = link.peer->hear();
    const std::string tail = numbers(1501, 2001);
    CHECK(heard.substr(heard.size() - tail.size()) == tail);
    CHECK(loop.live_bytes() <= before + 1024);
}

TEST_CASE("conn: an idle connection holds no buffers")
{
    Loop loop(&vkp_backend_poll);
    std::vector<std::unique_ptr<Link>> links;
    links.push_back(std::make_unique<Link>());
    links.back()->open(loop);
    REQUIRE(links.back()->peer->say("warm") == 4);
    vkp_test_run_until(loop, "data", [&] { return links.back()->end.data == "warm"; });
    const size_t before = loop.live_bytes();
    for (int i = 0; i < 100; i++) {
        links.push_back(std::make_unique<Link>());
        links.back()->open(loop);
        REQUIRE(links.back()->peer->say("some data") == 9);
        CHECK(push(*links.back(), "some push") == VKP_OK);
        vkp_test_run_until(loop, "data", [&] { return links.back()->end.data == "some data"; });
    }
    loop.rounds(3);
    CHECK((loop.live_bytes() - before) / 100 <= 8192);
}

TEST_CASE("conn: every allocation of open may fail")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    int fds[2];
    vkp_test_socket_pair(fds);
    Peer peer(fds[1]);
    uint64_t k = 1;
    for (;; k++) {
        INFO("allocation " << k);
        Conn end;
        const size_t blocks = loop.live_blocks();
        loop.fault(GENERATE(VKP_TEST_FAULT_ONCE, VKP_TEST_FAULT_FROM), k);
        vkp_status status = vkp_conn_open(loop, fds[0], &end.config, &end.conn);
        loop.fault(VKP_TEST_FAULT_NONE, 0);
        if (status == VKP_OK) {
            CHECK(end.opens == 1);
            break;
        }
        CHECK(status == VKP_ERR_NOMEM);
        CHECK(end.conn == nullptr);
        CHECK(end.told.empty());
        CHECK(fcntl(fds[0], F_GETFD) >= 0);
        CHECK(loop.live_blocks() <= blocks + 3); // the loop's own tables may stay grown
        loop.rounds(2);
    }
    CHECK(k > 3);
}

TEST_CASE("conn: every allocation of a busy connection may fail")
{
    // Whatever fails: each call tells, the peer gets what was accepted or sees a close, the
    // callbacks keep their order, and nothing is left.
    const vkp_backend *backend = &vkp_backend_null;
    const vkp_test_fault fault = GENERATE(VKP_TEST_FAULT_ONCE, VKP_TEST_FAULT_FROM);
    const vkp_on_full policy = GENERATE(VKP_ON_FULL_ERROR, VKP_ON_FULL_DROP_OLDEST);
    uint64_t failures = 1;
    int closed_for_memory = 0;
    for (uint64_t k = 1; failures > 0; k++) {
        INFO("allocation " << k << ", policy " << policy);
        Loop loop(backend, wired(), 1024);
        Link link(true);
        link.end.config.on_full = policy;
        link.end.config.queue_frames = 6;
        link.end.on_data = [](vkp_conn *, std::string_view view) {
            return view.size() < 3000 ? size_t{0} : view.size();
        };
        link.open(loop);
        std::string accepted;
        const std::string text = numbers(0, 60);
        const Sliced block(text, numbered_bytes);
        loop.fault(fault, k);
        for (size_t i = 0; i < 60; i++) {
            wire.allowance = static_cast<int64_t>(i * 7 % 40);
            const bool answer = i % 5 == 0;
            vkp_status status = answer ? block.send(link, i) : block.push(link, i);
            if (status == VKP_OK && (answer || policy == VKP_ON_FULL_ERROR)) {
                accepted += numbered(static_cast<int>(i));
            }
            REQUIRE((status == VKP_OK || status == VKP_ERR_NOMEM || status == VKP_ERR_FULL ||
                     status == VKP_ERR_CLOSED));
            if (i % 8 == 0 && link.end.closes == 0) {
                (void)link.peer->say(std::string(300, 'x'));
            }
            loop.round();
            loop.round();
        }
        failures = vkp_test_env_failures(&loop.test);
        loop.fault(VKP_TEST_FAULT_NONE, 0);
        wire.allowance = unlimited;
        loop.rounds(10);
        const std::string &heard = link.peer->hear();
        if (link.end.closes == 0) {
            REQUIRE(heard.size() % numbered_bytes == 0);
            if (policy == VKP_ON_FULL_ERROR) {
                REQUIRE(heard == accepted);
            } else {
                for (size_t i = 0; i < accepted.size(); i += numbered_bytes) {
                    REQUIRE(heard.find(accepted.substr(i, numbered_bytes)) != std::string::npos);
                }
            }
            CHECK(send_text(link, "+still\r\n") == VKP_OK); // it can still be used
        } else {
            closed_for_memory++;
            CHECK(link.end.closes == 1);
            CHECK(link.end.reason == VKP_CLOSE_NOMEM);
        }
        CHECK(link.end.after_close == 0);
    }
    CHECK(closed_for_memory > 0);
}

TEST_CASE("conn: a push of another thread that was accepted is not lost for want of memory")
{
    const vkp_on_full policy = GENERATE(VKP_ON_FULL_WAIT, VKP_ON_FULL_DROP_NEWEST);
    Loop loop(&vkp_backend_poll, wired());
    Link link;
    link.end.config.on_full = policy;
    link.open(loop);
    {
        Runner runner(loop);
        wire.allowance = 0;
        runner.stall();
        for (int i = 0; i < 3; i++) {
            CHECK(push(link, numbered(i), VKP_FOREVER) == VKP_OK);
        }
        loop.fault(VKP_TEST_FAULT_FROM, 1);
        runner.open();
        vkp_test_wait_until("an allocation that failed",
                            [&] { return vkp_test_env_failures(&loop.test) > 0; });
        loop.fault(VKP_TEST_FAULT_NONE, 0);
        runner.go();
        wire.allowance = unlimited;
        runner.call([] {});
        runner.call([] {});
    }
    loop.rounds(3);
    const std::string &heard = link.peer->hear();
    const size_t got = heard.size() / numbered_bytes;
    CHECK(heard == numbers(0, static_cast<int>(got)));
    // Written, or counted as dropped, or the connection ended and said why.
    CHECK((got + link.end.stats().dropped_frames == 3 ||
           (link.end.closes == 1 && link.end.reason == VKP_CLOSE_NOMEM)));
}

// ---- connecting ----

namespace {

// A listening TCP socket on 127.0.0.1 alone.
struct Server {
    int fd;
    int port = 0;
    Server() : fd(socket(AF_INET, SOCK_STREAM, 0))
    {
        sockaddr_in address = {};
        address.sin_family = AF_INET;
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        socklen_t bytes = sizeof address;
        if (bind(fd, reinterpret_cast<sockaddr *>(&address), bytes) != 0 || listen(fd, 8) != 0 ||
            getsockname(fd, reinterpret_cast<sockaddr *>(&address), &bytes) != 0) {
            vkp_test_fail("no server: %s", strerror(errno));
        }
        port = ntohs(address.sin_port);
    }
    ~Server()
    {
        close(fd);
    }
    Server(const Server &) = delete;
    Server &operator=(const Server &) = delete;
    std::string at(const char *host) const
    {
        return std::string("tcp:") + host + ":" + std::to_string(port);
    }
    int take() const
    {
        return accept(fd, nullptr, nullptr);
    }
};

// A port that refuses.
int dead_port()
{
    Server server;
    return server.port;
}

} // namespace

TEST_CASE("conn: connect reaches a server by number and by name, over all addresses of the name")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Server server;
    const char *host = GENERATE("127.0.0.1", "localhost"); // localhost may say ::1 first
    Conn end;
    REQUIRE(vkp_conn_connect(loop, vkp_str_of(server.at(host).c_str()), &end.config, &end.conn) ==
            VKP_OK);
    CHECK(push(end.conn, "pushed before it stood") == VKP_OK);
    vkp_test_run_until(loop, "the connection", [&] { return end.opens + end.closes > 0; });
    REQUIRE(end.opens == 1);
    CHECK(end.closes == 0);
    Peer peer(server.take());
    REQUIRE(peer.say("welcome") == 7);
    vkp_test_run_until(loop, "both words", [&] {
        return end.data == "welcome" && peer.hear() == "pushed before it stood";
    });
    CHECK(end.opens == 1);
    CHECK(fcntl(vkp_conn_get_fd(end.conn), F_GETFD) & FD_CLOEXEC);
    end.drop();
    CHECK(end.reason == VKP_CLOSE_LOCAL);
}

TEST_CASE("conn: connect reaches a Unix socket")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    const char *path = vkp_test_fresh_path("c");
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::strcpy(address.sun_path, path);
    int server = socket(AF_UNIX, SOCK_STREAM, 0);
    REQUIRE(bind(server, reinterpret_cast<sockaddr *>(&address), sizeof address) == 0);
    REQUIRE(listen(server, 4) == 0);
    Conn end;
    REQUIRE(vkp_conn_connect(loop, vkp_str_of((std::string("unix:") + path).c_str()), &end.config,
                             &end.conn) == VKP_OK);
    vkp_test_run_until(loop, "the connection", [&] { return end.opens > 0; });
    Peer peer(accept(server, nullptr, nullptr));
    CHECK(push(end.conn, "hello") == VKP_OK);
    vkp_test_run_until(loop, "the push", [&] { return peer.hear() == "hello"; });
    close(server);
    unlink(path);
}

TEST_CASE("conn: a refused connection says so once, and never opens")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Conn end;
    const std::string address =
        GENERATE(as<std::string>{}, "tcp:127.0.0.1", "tcp:localhost", "unix:");
    const std::string whole = address == "unix:" ? vkp_test_fresh_address("nobody")
                                                 : address + ":" + std::to_string(dead_port());
    errno = 0;
    vkp_status status = vkp_conn_connect(loop, vkp_str_of(whole.c_str()), &end.config, &end.conn);
    if (status == VKP_OK) {
        vkp_test_run_until(loop, "the refusal", [&] { return end.closes > 0; });
        loop.rounds(3);
        CHECK(end.closes == 1);
        CHECK(end.reason == VKP_CLOSE_ERROR);
        CHECK(end.error == ECONNREFUSED);
        CHECK_FALSE(vkp_conn_is_open(end.conn));
    } else { // some systems know at once
        CHECK(status == VKP_ERR_SYS);
        CHECK((errno == ECONNREFUSED || errno == ENOENT));
        CHECK(end.conn == nullptr);
        CHECK(end.closes == 0);
    }
    CHECK(end.opens == 0);
}

TEST_CASE("conn: closing while connecting")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Server server;
    Conn end;
    REQUIRE(vkp_conn_connect(loop, vkp_str_of(server.at("127.0.0.1").c_str()), &end.config,
                             &end.conn) == VKP_OK);
    CHECK(push(end.conn, "never written") == VKP_OK);
    SECTION("by close")
    {
        vkp_conn_close(end.conn);
        CHECK(end.reason == VKP_CLOSE_LOCAL);
    }
    SECTION("by the loop")
    {
        loop.close();
        CHECK(end.reason == VKP_CLOSE_LOOP);
    }
    CHECK(end.closes == 1);
    CHECK(end.opens == 0);
    end.drop();
}

TEST_CASE("conn: a drain while connecting still writes")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Server server;
    Conn end;
    REQUIRE(vkp_conn_connect(loop, vkp_str_of(server.at("127.0.0.1").c_str()), &end.config,
                             &end.conn) == VKP_OK);
    CHECK(push(end.conn, "one word") == VKP_OK);
    vkp_conn_drain(end.conn);
    vkp_test_run_until(loop, "the close", [&] { return end.closes > 0; });
    CHECK(end.opens == 1);
    CHECK(end.reason == VKP_CLOSE_LOCAL);
    Peer peer(server.take());
    vkp_test_wait_until("the word", [&] { return peer.hear() == "one word" && peer.ended; });
}

TEST_CASE("conn: pushes of other threads that wait for the connection to stand")
{
    // The backend keeps the event back until both queues are full.
    static std::atomic<bool> held;
    held = true;
    vkp_backend backend = vkp_backend_poll;
    backend.wait = [](void *state, uint64_t deadline_ns, vkp_event *out, size_t capacity,
                      size_t *count) {
        vkp_status status = vkp_backend_poll.wait(state, deadline_ns, out, capacity, count);
        *count = held ? 0 : *count;
        return status;
    };
    Loop loop(&backend);
    Server server;
    Conn end;
    end.config.queue_frames = 2;
    REQUIRE(vkp_conn_connect(loop, vkp_str_of(server.at("127.0.0.1").c_str()), &end.config,
                             &end.conn) == VKP_OK);
    {
        Runner runner(loop);
        std::thread pusher([&] {
            for (int i = 0; i < 10; i++) {
                (void)push(end.conn, numbered(i), VKP_FOREVER);
            }
        });
        size_t queued = 0;
        while (queued < 2) {
            runner.call([&] { queued = end.stats().queued_frames; });
        }
        runner.call([] {});
        held = false;
        pusher.join();
    }
    Peer peer(server.take());
    vkp_test_run_until(loop, "all frames", [&] { return peer.hear() == numbers(0, 10); });
    CHECK(end.opens == 1);
}

TEST_CASE("conn: addresses that are none")
{
    Loop loop(&vkp_backend_poll);
    Conn end;
    const char *address = GENERATE(
        "", "unix:", "unix:../x", "tcp:", "tcp:1", "tcp::1", "tcp:127.0.0.1:", "tcp:127.0.0.1:http",
        "tcp:127.0.0.1:-1", "tcp:127.0.0.1:65536", "tcp:127.0.0.1:99999999999", "tcp:127.0.0.1: 80",
        "127.0.0.1:80", "TCP:127.0.0.1:1", "http://127.0.0.1:80");
    INFO("address " << address);
    CHECK(vkp_conn_connect(loop, vkp_str_of(address), &end.config, &end.conn) == VKP_ERR_INVALID);
    const std::string long_host = "tcp:" + std::string(300, 'h') + ":1";
    CHECK(vkp_conn_connect(loop, vkp_str_of(long_host.c_str()), &end.config, &end.conn) ==
          VKP_ERR_INVALID);
    const std::string long_path = "unix:/" + std::string(300, 'p');
    CHECK(vkp_conn_connect(loop, vkp_str_of(long_path.c_str()), &end.config, &end.conn) ==
          VKP_ERR_LIMIT);
    CHECK(vkp_conn_connect(loop, vkp_str_of(nullptr), &end.config, &end.conn) == VKP_ERR_INVALID);
    CHECK(vkp_conn_connect(loop, vkp_str_of("unix:x"), nullptr, &end.conn) == VKP_ERR_INVALID);
    CHECK(vkp_conn_connect(loop, vkp_str_of("unix:x"), &end.config, nullptr) == VKP_ERR_INVALID);
    CHECK(end.conn == nullptr);
    CHECK(end.told.empty());
}

TEST_CASE("conn: a name that nobody knows is refused")
{
    vkp_sys sys = *vkp_sys_get_default();
    sys.resolve = [](const char *, const char *, vkp_address *, size_t) { return -ENOENT; };
    Loop loop(&vkp_backend_poll, &sys);
    Conn end;
    CHECK(vkp_conn_connect(loop, vkp_str_of("tcp:nobody.invalid:80"), &end.config, &end.conn) ==
          VKP_ERR_REFUSED);
    CHECK(end.conn == nullptr);
    CHECK(end.told.empty());
}

TEST_CASE("conn: every address of a name is tried in turn")
{
    static int calls;
    static int dead;
    vkp_sys sys = *vkp_sys_get_default();
    sys.resolve = [](const char *host, const char *port, vkp_address *out, size_t capacity) {
        // The live one comes last.
        const std::string refused = std::to_string(dead);
        int found = 0;
        while (found < 3) {
            found += vkp_sys_get_default()->resolve("127.0.0.1", refused.c_str(), out + found, 1);
        }
        return found + vkp_sys_get_default()->resolve(host, port, out + found,
                                                      capacity - static_cast<size_t>(found));
    };
    sys.connect = [](int fd, const void *address, uint32_t bytes) {
        calls++;
        return vkp_sys_get_default()->connect(fd, address, bytes);
    };
    calls = 0;
    ON_EVERY_BACKEND;
    Loop loop(backend, &sys);
    Server server;
    dead = dead_port();
    Conn end;
    REQUIRE(vkp_conn_connect(loop, vkp_str_of(server.at("127.0.0.1").c_str()), &end.config,
                             &end.conn) == VKP_OK);
    vkp_test_run_until(loop, "the connection", [&] { return end.opens + end.closes > 0; });
    CHECK(end.opens == 1);
    CHECK(end.closes == 0);
    CHECK(calls == 4);
}

TEST_CASE("conn: every allocation of connect may fail")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Server server;
    uint64_t k = 1;
    for (;; k++) {
        INFO("allocation " << k);
        Conn end;
        const int fds = vkp_test_fd_count();
        loop.fault(VKP_TEST_FAULT_ONCE, k);
        vkp_status status = vkp_conn_connect(loop, vkp_str_of(server.at("127.0.0.1").c_str()),
                                             &end.config, &end.conn);
        loop.fault(VKP_TEST_FAULT_NONE, 0);
        if (status == VKP_OK) {
            break;
        }
        CHECK(status == VKP_ERR_NOMEM);
        CHECK(end.conn == nullptr);
        CHECK(end.told.empty());
        CHECK(vkp_test_fd_count() == fds);
        loop.rounds(2);
    }
    CHECK(k > 4);
}

TEST_CASE("conn: system calls of connect that fail")
{
    static int fault;
    vkp_sys sys = *vkp_sys_get_default();
    Conn end;
    fault = EMFILE;
    SECTION("socket")
    {
        sys.socket = [](int, int) { return -fault; };
    }
    SECTION("connect")
    {
        fault = ENETUNREACH;
        sys.connect = [](int, const void *, uint32_t) { return -fault; };
    }
    Loop loop(&vkp_backend_poll, &sys);
    errno = 0;
    CHECK(vkp_conn_connect(loop, vkp_str_of("tcp:127.0.0.1:1"), &end.config, &end.conn) ==
          VKP_ERR_SYS);
    CHECK(errno == fault);
    CHECK(end.conn == nullptr);
    CHECK(end.told.empty());
}
