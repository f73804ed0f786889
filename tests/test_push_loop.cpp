// SPDX-License-Identifier: MIT
//
// From a channel of pushes to a callback, a connection or a hub: in a thread of its own and on an
// event loop, with ends, cancellations and sinks that fail.
#include "support/catch.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <unistd.h>

#include "support/support.h"

namespace {

std::string bulk(std::string_view text)
{
    return "$" + std::to_string(text.size()) + "\r\n" + std::string(text) + "\r\n";
}

std::string message(std::string_view channel, std::string_view payload)
{
    return ">3\r\n" + bulk("message") + bulk(channel) + bulk(payload);
}

// A push as a client would put it into the channel: it owns its frame, and views it.
vkp_push make_push(std::string_view channel, std::string_view payload, const vkp_env *env = nullptr)
{
    const std::string text = message(channel, payload);
    vkp_push push = {};
    if (vkp_bytes_copy(env, text.data(), text.size(), &push.frame) != VKP_OK) {
        vkp_test_fail("no frame");
    }
    const char *data = reinterpret_cast<const char *>(push.frame.data);
    push.kind = VKP_PUSH_MESSAGE;
    push.payload = {data + text.size() - 2 - payload.size(), payload.size()};
    push.channel = {data + text.find(channel, 16), channel.size()};
    return push;
}

vkp_push make_event(vkp_push_kind kind)
{
    vkp_push push = {};
    push.kind = kind;
    return push;
}

// A channel of pushes whose memory is counted.
struct Channel {
    vkp_test_env test;
    vkp_mpsc_tx *tx = nullptr;
    vkp_mpsc_rx *rx = nullptr;

    explicit Channel(size_t elem_bytes = sizeof(vkp_push))
    {
        vkp_test_env_init(&test);
        vkp_mpsc_config config = {};
        config.elem_bytes = elem_bytes;
        if (elem_bytes == sizeof(vkp_push)) {
            config.cost = vkp_push_get_cost;
            config.drop = vkp_push_drop;
        }
        config.env = &test.env;
        if (vkp_mpsc_open(&config, &tx, &rx) != VKP_OK) {
            vkp_test_fail("no channel");
        }
    }
    ~Channel()
    {
        finish();
        vkp_mpsc_rx_unref(rx);
        if (std::uncaught_exceptions() == 0) {
            vkp_test_env_deinit(&test); // every push was given back
        }
    }
    Channel(const Channel &) = delete;
    Channel &operator=(const Channel &) = delete;
    void put(vkp_push push) const
    {
        if (vkp_mpsc_send(tx, &push, VKP_FOREVER) != VKP_OK) {
            vkp_push_unref(&push);
        }
    }
    void put(std::string_view payload)
    {
        put(make_push("news", payload, &test.env));
    }
    void finish()
    {
        vkp_mpsc_tx_unref(std::exchange(tx, nullptr));
    }
};

struct Heard {
    std::vector<std::string> payloads;
    std::vector<vkp_push_kind> kinds;
    std::function<void()> then;
    vkp_sink sink()
    {
        vkp_sink sink = {};
        sink.user = this;
        sink.callback = [](void *user, const vkp_push *push) {
            Heard *self = static_cast<Heard *>(user);
            self->payloads.emplace_back(vkp_test_view(push->payload));
            self->kinds.push_back(push->kind);
            if (self->then) {
                self->then();
            }
        };
        return sink;
    }
};

// Blocks the connections' writes.
std::atomic<bool> wire_blocked{false};

const vkp_sys *wired()
{
    static const vkp_sys table = [] {
        vkp_sys copy = *vkp_sys_get_default();
        copy.send = [](int fd, const vkp_range *ranges, size_t count) -> int64_t {
            return wire_blocked ? -EAGAIN : vkp_sys_get_default()->send(fd, ranges, count);
        };
        return copy;
    }();
    wire_blocked = false;
    return &table;
}

class Loop {
  public:
    explicit Loop(const vkp_backend *backend = &vkp_backend_poll)
    {
        vkp_test_env_init(&test);
        test.env.sys = wired();
        vkp_loop_config config = {};
        config.backend = backend;
        config.env = &test.env;
        if (vkp_loop_open(&config, &loop_) != VKP_OK) {
            vkp_test_fail("no loop");
        }
    }
    ~Loop()
    {
        close();
        if (std::uncaught_exceptions() == 0) {
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
    void rounds(int count)
    {
        for (int i = 0; i < count; i++) {
            if (vkp_loop_run_once(loop_, 0) != VKP_OK) {
                vkp_test_fail("a round failed");
            }
        }
    }
    vkp_test_env test;

  private:
    vkp_loop *loop_ = nullptr;
};

// A connection on the loop and the descriptor at its other end.
struct Link {
    vkp_conn *conn = nullptr;
    int peer = -1;
    Link(vkp_loop *loop, vkp_conn_config config = {})
    {
        static const vkp_conn_ops ops = {};
        config.ops = &ops;
        int fds[2];
        vkp_test_socket_pair(fds);
        if (vkp_conn_open(loop, fds[0], &config, &conn) != VKP_OK) {
            vkp_test_fail("no connection");
        }
        peer = fds[1];
        fcntl(peer, F_SETFL, O_NONBLOCK);
    }
    ~Link()
    {
        vkp_conn_close(conn);
        vkp_conn_unref(conn);
        close(peer);
    }
    Link(const Link &) = delete;
    Link &operator=(const Link &) = delete;
    const std::string &hear()
    {
        char buffer[4096];
        for (ssize_t got; (got = read(peer, buffer, sizeof buffer)) > 0;) {
            heard.append(buffer, static_cast<size_t>(got));
        }
        return heard;
    }
    vkp_sink sink() const
    {
        vkp_sink sink = {};
        sink.conn = conn;
        return sink;
    }
    std::string heard;
};

std::vector<std::string> numbers(int from, int until)
{
    std::vector<std::string> all;
    for (int i = from; i < until; i++) {
        all.push_back(std::to_string(i));
    }
    return all;
}

std::string messages(int from, int until)
{
    std::string all;
    for (const std::string &number : numbers(from, until)) {
        all += message("news", number);
    }
    return all;
}

// vkp_loop_run in a thread; its end stops it.
class Runner {
  public:
    explicit Runner(vkp_loop *loop) : loop_(loop)
    {
        std::atomic<bool> running{false};
        if (vkp_loop_post(
                loop, [](void *user) { *static_cast<std::atomic<bool> *>(user) = true; },
                &running) != VKP_OK) {
            vkp_test_fail("no post");
        }
        thread_ = std::thread([this] { status_ = vkp_loop_run(loop_); });
        vkp_test_wait_until("the loop", [&] { return running.load(); });
    }
    ~Runner()
    {
        vkp_loop_stop(loop_);
        thread_.join();
        if (status_ != VKP_OK) {
            vkp_test_fail("the loop failed");
        }
    }
    Runner(const Runner &) = delete;
    Runner &operator=(const Runner &) = delete;

  private:
    vkp_loop *loop_;
    vkp_status status_ = VKP_OK;
    std::thread thread_;
};

} // namespace

// ---- in a thread ----

TEST_CASE("push loop: run needs exactly one sink, of a kind that a thread may use")
{
    Loop loop;
    Channel channel;
    Link link(loop);
    Heard heard;
    vkp_hub *hub = nullptr;
    REQUIRE(vkp_hub_open(nullptr, &hub) == VKP_OK);
    const vkp_sink none = {};
    vkp_sink two = heard.sink();
    two.conn = link.conn;
    vkp_sink a_hub = {};
    a_hub.hub = hub;
    const vkp_sink good = heard.sink();
    CHECK(vkp_push_loop_run(nullptr, &good, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_push_loop_run(channel.rx, nullptr, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_push_loop_run(channel.rx, &none, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_push_loop_run(channel.rx, &two, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_push_loop_run(channel.rx, &a_hub, nullptr) == VKP_ERR_INVALID);
    Channel other(8);
    CHECK(vkp_push_loop_run(other.rx, &good, nullptr) == VKP_ERR_INVALID); // not of pushes
    CHECK(heard.payloads.empty());
    vkp_hub_unref(hub);
}

TEST_CASE("push loop: run drains the channel, in order, and says OK when it closed")
{
    Channel channel;
    Heard heard;
    const vkp_sink sink = heard.sink();
    for (int i = 0; i < 200; i++) {
        channel.put(std::to_string(i));
    }
    SECTION("by its senders")
    {
        channel.finish();
    }
    SECTION("by its receiver")
    {
        vkp_mpsc_close(channel.rx);
    }
    CHECK(vkp_push_loop_run(channel.rx, &sink, nullptr) == VKP_OK);
    CHECK(heard.payloads == numbers(0, 200));
    CHECK(vkp_push_loop_run(channel.rx, &sink, nullptr) == VKP_OK); // closed it stays
    CHECK(heard.payloads.size() == 200);
}

TEST_CASE("push loop: run waits for pushes, events of the client among them")
{
    Channel channel;
    Heard heard;
    const vkp_sink sink = heard.sink();
    std::thread sender([&] {
        for (int i = 0; i < 1000; i++) {
            channel.put(std::to_string(i));
            if (i % 100 == 0) {
                channel.put(make_event(VKP_PUSH_GAP));
            }
        }
        channel.finish();
    });
    CHECK(vkp_push_loop_run(channel.rx, &sink, nullptr) == VKP_OK);
    sender.join();
    CHECK(std::count(heard.kinds.begin(), heard.kinds.end(), VKP_PUSH_GAP) == 10);
    heard.payloads.erase(std::remove(heard.payloads.begin(), heard.payloads.end(), ""),
                         heard.payloads.end());
    CHECK(heard.payloads == numbers(0, 1000));
}

TEST_CASE("push loop: a token ends the run")
{
    Channel channel;
    Heard heard;
    const vkp_sink sink = heard.sink();
    vkp_cancel *cancel = nullptr;
    REQUIRE(vkp_cancel_open(nullptr, nullptr, &cancel) == VKP_OK);
    SECTION("triggered before")
    {
        channel.put("x");
        vkp_cancel_trigger(cancel);
        CHECK(vkp_push_loop_run(channel.rx, &sink, cancel) == VKP_ERR_CANCELLED);
        CHECK(heard.payloads.empty()); // nothing taken, nothing lost
        channel.finish();
        CHECK(vkp_push_loop_run(channel.rx, &sink, nullptr) == VKP_OK);
        CHECK(heard.payloads == std::vector<std::string>{"x"});
    }
    SECTION("triggered by the sink: what was taken is still written")
    {
        for (int i = 0; i < 500; i++) {
            channel.put(std::to_string(i));
        }
        heard.then = [&] { vkp_cancel_trigger(cancel); };
        CHECK(vkp_push_loop_run(channel.rx, &sink, cancel) == VKP_ERR_CANCELLED);
        CHECK(heard.payloads.size() < 500);
        channel.finish();
        CHECK(vkp_push_loop_run(channel.rx, &sink, nullptr) == VKP_OK);
        CHECK(heard.payloads == numbers(0, 500));
    }
    SECTION("triggered while it waits")
    {
        std::thread other([&] { vkp_cancel_trigger(cancel); });
        CHECK(vkp_push_loop_run(channel.rx, &sink, cancel) == VKP_ERR_CANCELLED);
        other.join();
    }
    vkp_cancel_unref(cancel);
}

TEST_CASE("push loop: run writes frames to a connection as received, and no events")
{
    Loop loop;
    Channel channel;
    Link link(loop);
    const vkp_sink sink = link.sink();
    for (int i = 0; i < 300; i++) {
        channel.put(std::to_string(i));
        channel.put(make_event(VKP_PUSH_DISCONNECTED));
    }
    channel.finish();
    {
        Runner runner(loop);
        // Reads meanwhile: the kernel's buffer may not hold 300 small writes.
        std::thread other([&] {
            vkp_test_wait_until("the frames", [&] { return link.hear() == messages(0, 300); });
        });
        CHECK(vkp_push_loop_run(channel.rx, &sink, nullptr) == VKP_OK);
        other.join();
    }
}

TEST_CASE("push loop: a connection that waits holds the run back and loses nothing")
{
    Loop loop;
    vkp_conn_config config = {};
    config.queue_frames = 4;
    Channel channel; // outlives the link, whose queues hold frames of its memory
    Link link(loop, config);
    const vkp_sink sink = link.sink();
    for (int i = 0; i < 300; i++) {
        channel.put(std::to_string(i));
    }
    channel.finish();
    wire_blocked = true;
    {
        Runner runner(loop);
        std::thread other([&] {
            vkp_test_wait_until("full queues", [&] { return vkp_mpsc_get_len(channel.rx) < 300; });
            wire_blocked = false;
            // Reads meanwhile: the kernel's buffer may not hold 300 small writes.
            vkp_test_wait_until("the frames", [&] { return link.hear() == messages(0, 300); });
        });
        CHECK(vkp_push_loop_run(channel.rx, &sink, nullptr) == VKP_OK);
        other.join();
    }
}

TEST_CASE("push loop: a token ends the run that waits for a connection")
{
    Loop loop;
    vkp_conn_config config = {};
    config.queue_frames = 2;
    Channel channel; // outlives the link, whose queues hold frames of its memory
    Link link(loop, config);
    const vkp_sink sink = link.sink();
    vkp_cancel *cancel = nullptr;
    REQUIRE(vkp_cancel_open(nullptr, nullptr, &cancel) == VKP_OK);
    for (int i = 0; i < 300; i++) {
        channel.put(std::to_string(i));
    }
    wire_blocked = true; // for ever: only the token can end it
    {
        Runner runner(loop);
        std::thread other([&] {
            vkp_test_wait_until("full queues", [&] { return vkp_mpsc_get_len(channel.rx) < 300; });
            vkp_cancel_trigger(cancel);
        });
        CHECK(vkp_push_loop_run(channel.rx, &sink, cancel) == VKP_ERR_CANCELLED);
        other.join();
    }
    vkp_cancel_unref(cancel);
}

TEST_CASE("push loop: a sink that fails loses that push, and the run goes on")
{
    Loop loop;
    vkp_conn_config config = {};
    config.queue_frames = 2;
    config.on_full = GENERATE(VKP_ON_FULL_ERROR, VKP_ON_FULL_DROP_NEWEST);
    Channel channel; // outlives the link, whose queues hold frames of its memory
    Link link(loop, config);
    const vkp_sink sink = link.sink();
    for (int i = 0; i < 200; i++) {
        channel.put(std::to_string(i));
    }
    channel.finish();
    SECTION("a closed connection")
    {
        vkp_conn_close(link.conn);
        CHECK(vkp_push_loop_run(channel.rx, &sink, nullptr) == VKP_OK);
        loop.rounds(2);
        CHECK(link.hear().empty());
    }
    SECTION("a full queue")
    {
        wire_blocked = true;
        CHECK(vkp_push_loop_run(channel.rx, &sink, nullptr) == VKP_OK); // as the loop's thread
        wire_blocked = false;
        vkp_test_run_until(loop, "the first", [&] { return link.hear() == messages(0, 2); });
    }
    CHECK(vkp_mpsc_get_len(channel.rx) == 0);
}

// ---- on an event loop ----

namespace {

struct LoopForm {
    vkp_push_loop *push_loop = nullptr;
    int ends = 0;
    std::function<void()> at_end;
    vkp_status open(vkp_loop *loop, vkp_mpsc_rx *rx, const vkp_sink &sink)
    {
        return vkp_push_loop_open(
            loop, rx, &sink,
            [](void *user) {
                LoopForm *self = static_cast<LoopForm *>(user);
                self->ends++;
                if (self->at_end) {
                    self->at_end();
                }
            },
            this, &push_loop);
    }
    // Takes the channel's receiver on success.
    void open(vkp_loop *loop, Channel &channel, const vkp_sink &sink)
    {
        if (open(loop, channel.rx, sink) != VKP_OK) {
            vkp_test_fail("no push loop");
        }
        channel.rx = nullptr;
    }
    void drop()
    {
        vkp_push_loop_unref(std::exchange(push_loop, nullptr));
    }
    ~LoopForm()
    {
        drop();
    }
};

} // namespace

TEST_CASE("push loop: open refuses what cannot be, and leaves the receiver")
{
    Loop loop;
    Channel channel;
    Heard heard;
    const vkp_sink good = heard.sink();
    const vkp_sink none = {};
    vkp_push_loop *made = nullptr;
    CHECK(vkp_push_loop_open(nullptr, channel.rx, &good, nullptr, nullptr, &made) ==
          VKP_ERR_INVALID);
    CHECK(vkp_push_loop_open(loop, nullptr, &good, nullptr, nullptr, &made) == VKP_ERR_INVALID);
    CHECK(vkp_push_loop_open(loop, channel.rx, nullptr, nullptr, nullptr, &made) ==
          VKP_ERR_INVALID);
    CHECK(vkp_push_loop_open(loop, channel.rx, &none, nullptr, nullptr, &made) == VKP_ERR_INVALID);
    CHECK(vkp_push_loop_open(loop, channel.rx, &good, nullptr, nullptr, nullptr) ==
          VKP_ERR_INVALID);
    Channel other(8);
    CHECK(vkp_push_loop_open(loop, other.rx, &good, nullptr, nullptr, &made) == VKP_ERR_INVALID);
    int failed = 0;
    for (uint64_t k = 1; made == nullptr; k++) {
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_ONCE, k);
        vkp_status status = vkp_push_loop_open(loop, channel.rx, &good, nullptr, nullptr, &made);
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
        if (status != VKP_OK) {
            CHECK(status == VKP_ERR_NOMEM);
            failed++;
        }
    }
    CHECK(failed >= 2);
    channel.rx = nullptr;
    channel.put("after all");
    vkp_test_run_until(loop, "the push", [&] { return heard.payloads.size() == 1; });
    vkp_push_loop_unref(made);
    vkp_push_loop_unref(nullptr);
}

TEST_CASE("push loop: on a loop: pushes in order, then the end, once")
{
    for (const vkp_backend *const *backend = vkp_test_backends(); *backend != nullptr; backend++) {
        INFO("backend " << (*backend)->name);
        Loop loop(*backend);
        Channel channel;
        Heard heard;
        LoopForm form;
        form.open(loop, channel, heard.sink());
        for (int i = 0; i < 500; i++) {
            channel.put(std::to_string(i));
        }
        vkp_test_run_until(loop, "the pushes", [&] { return heard.payloads.size() == 500; });
        CHECK(form.ends == 0);
        std::thread sender([&] {
            for (int i = 500; i < 1500; i++) {
                channel.put(std::to_string(i));
            }
            channel.finish();
        });
        vkp_test_run_until(loop, "the end", [&] { return form.ends > 0; });
        sender.join();
        loop.rounds(3);
        CHECK(form.ends == 1);
        CHECK(heard.payloads == numbers(0, 1500));
    }
}

TEST_CASE("push loop: on a loop: a busy channel leaves others their turn")
{
    Loop loop;
    Channel channel;
    Heard heard;
    LoopForm form;
    form.open(loop, channel, heard.sink());
    heard.then = [&] { // each push is followed by another: the channel is never empty
        if (heard.payloads.size() < 100000) {
            channel.put("more");
        }
    };
    channel.put("first");
    static int turns;
    turns = 0;
    for (int i = 0; i < 10; i++) {
        REQUIRE(vkp_loop_post(
                    loop, [](void *) { turns++; }, nullptr) == VKP_OK);
        loop.rounds(1);
        CHECK(turns == i + 1);
    }
    CHECK(heard.payloads.size() < 100000);
    form.drop();
    loop.rounds(2); // a watch that was about to call holds the channel until then
}

TEST_CASE("push loop: on a loop: to a hub")
{
    Loop loop;
    vkp_hub *hub = nullptr;
    REQUIRE(vkp_hub_open(nullptr, &hub) == VKP_OK);
    Link link(loop);
    vkp_hub_member member = {};
    member.conn = link.conn;
    member.protocol = 3;
    REQUIRE(vkp_hub_subscribe(hub, &member, VKP_SUB_CHANNEL, vkp_str_of("news"), nullptr) ==
            VKP_OK);
    {
        Channel channel;
        LoopForm form;
        vkp_sink sink = {};
        sink.hub = hub;
        form.open(loop, channel, sink);
        for (int i = 0; i < 100; i++) {
            channel.put(std::to_string(i));
            channel.put(make_push("nobody's", "x", &channel.test.env));
            channel.put(make_event(VKP_PUSH_RECONNECTED));
        }
        vkp_test_run_until(loop, "the messages", [&] { return link.hear() == messages(0, 100); });
    }
    vkp_hub_leave(hub, &member);
    vkp_hub_unref(hub);
}

TEST_CASE("push loop: on a loop: to a connection, which it keeps a reference of")
{
    Loop loop;
    Channel channel;
    LoopForm form;
    {
        Link link(loop);
        form.open(loop, channel, link.sink());
        for (int i = 0; i < 100; i++) {
            channel.put(std::to_string(i));
            channel.put(make_event(VKP_PUSH_GAP));
        }
        vkp_test_run_until(loop, "the messages", [&] { return link.hear() == messages(0, 100); });
    }
    // Closed and given back: pushes for it are lost, and the loop goes on.
    channel.put("lost");
    channel.finish();
    vkp_test_run_until(loop, "the end", [&] { return form.ends > 0; });
    CHECK(form.ends == 1);
}

TEST_CASE("push loop: on a loop: unref stops it, wherever it is called")
{
    Loop loop;
    Channel channel;
    Heard heard;
    LoopForm form;
    const size_t before = vkp_test_env_live_blocks(&loop.test);
    form.open(loop, channel, heard.sink());
    for (int i = 0; i < 10; i++) {
        channel.put(std::to_string(i));
    }
    SECTION("between rounds")
    {
        loop.rounds(1);
        form.drop();
        loop.rounds(3);
        CHECK(form.ends == 0);
    }
    SECTION("before anything was received")
    {
        form.drop();
        loop.rounds(3);
        CHECK(heard.payloads.empty());
    }
    SECTION("in the sink's callback")
    {
        heard.then = [&] { form.drop(); };
        vkp_test_run_until(loop, "a push", [&] { return !heard.payloads.empty(); });
        loop.rounds(3);
        CHECK(heard.payloads == numbers(0, 1));
        CHECK(form.ends == 0);
    }
    SECTION("in on_end")
    {
        form.at_end = [&] { form.drop(); };
        channel.finish();
        vkp_test_run_until(loop, "the end", [&] { return form.ends > 0; });
        loop.rounds(3);
        CHECK(heard.payloads == numbers(0, 10));
        CHECK(form.ends == 1);
    }
    SECTION("after the end")
    {
        channel.finish();
        vkp_test_run_until(loop, "the end", [&] { return form.ends > 0; });
        form.drop();
    }
    CHECK(form.push_loop == nullptr);
    loop.rounds(2);
    CHECK(vkp_test_env_live_blocks(&loop.test) <= before);
    if (channel.tx != nullptr) { // the receiver went with it
        CHECK(vkp_mpsc_is_closed(channel.tx));
    }
}

TEST_CASE("push loop: on a loop: the loop's close leaves it silent until its unref")
{
    Loop loop;
    Channel channel;
    Heard heard;
    LoopForm form;
    form.open(loop, channel, heard.sink());
    vkp_loop *mine = vkp_loop_ref(loop);
    loop.close();
    channel.put("too late");
    channel.finish();
    CHECK(heard.payloads.empty());
    CHECK(form.ends == 0);
    form.drop();
    vkp_loop_unref(mine);
}
