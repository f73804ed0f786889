/* What the tests of the client share: a loop that checks what it gave back, a client that writes
   down its pushes, a question with its slot and reply, values as text to compare with.
   SPDX-License-Identifier: MIT                                                                  */
#ifndef VKP_TEST_CLIENT_PROBE_H
#define VKP_TEST_CLIENT_PROBE_H

#include "support/support.h"

#include <atomic>
#include <functional>
#include <initializer_list>
#include <string>
#include <thread>
#include <utility>
#include <vector>

/* Declare it before everything that lives on it: at its end no block and no descriptor that was
   opened after it may be left.                                                                  */
class vkp_test_loop {
  public:
    explicit vkp_test_loop(const vkp_backend *backend = *vkp_test_backends(),
                           const vkp_sys *sys = nullptr, size_t read_bytes = 0)
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
    ~vkp_test_loop()
    {
        close();
        if (vkp_test_fd_count() != fds_before_) {
            vkp_test_fail("%d descriptors before, %d after", fds_before_, vkp_test_fd_count());
        }
        vkp_test_env_deinit(&test);
    }
    vkp_test_loop(const vkp_test_loop &) = delete;
    vkp_test_loop &operator=(const vkp_test_loop &) = delete;
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
    uint64_t now() const
    {
        return vkp_loop_get_now_ns(loop_);
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
    vkp_loop *loop_ = nullptr;
};

/* Runs a loop in a thread of its own until its end. Waits until it runs: before, whoever calls
   counts as the loop's thread.                                                                  */
class vkp_test_loop_thread {
  public:
    explicit vkp_test_loop_thread(vkp_loop *loop) : loop_(loop)
    {
        std::atomic<bool> running{false};
        const vkp_status status = vkp_loop_post(
            loop, [](void *user) { static_cast<std::atomic<bool> *>(user)->store(true); },
            &running);
        if (status != VKP_OK) {
            vkp_test_fail("the loop takes no calls");
        }
        thread_ = std::thread([loop] {
            if (vkp_loop_run(loop) != VKP_OK) {
                vkp_test_fail("the loop failed");
            }
        });
        vkp_test_wait_until("a running loop", [&] { return running.load(); });
    }
    ~vkp_test_loop_thread()
    {
        stop();
    }
    void stop()
    {
        if (thread_.joinable()) {
            vkp_loop_stop(loop_);
            thread_.join();
        }
    }

  private:
    vkp_loop *loop_;
    std::thread thread_;
};

struct vkp_test_event {
    vkp_push_kind kind;
    vkp_sub_kind sub;
    std::string channel;
    std::string pattern;
    std::string payload;
    std::string frame;
    vkp_gap gap;                    /* without its names */
    std::vector<std::string> names; /* of the gap; none: all */
    uint64_t missed;
};

inline std::vector<std::string> vkp_test_gap_names(const vkp_gap *gap)
{
    std::vector<std::string> names;
    for (size_t i = 0; gap != nullptr && i < gap->name_count; i++) {
        names.emplace_back(vkp_test_view(gap->names[i].name));
    }
    return names;
}

inline vkp_test_event vkp_test_event_of(const vkp_push &push)
{
    return {push.kind,
            push.sub,
            std::string(vkp_test_view(push.channel)),
            std::string(vkp_test_view(push.pattern)),
            std::string(vkp_test_view(push.payload)),
            push.frame.len
                ? std::string(reinterpret_cast<const char *>(push.frame.data), push.frame.len)
                : std::string(),
            push.gap != nullptr ? *push.gap : vkp_gap{},
            vkp_test_gap_names(push.gap),
            push.missed};
}

/* "message c hi", "pmessage p* c hi", "subscribed c", "gap" of all, "gap c d", ... */
inline std::string vkp_test_line(const vkp_test_event &event)
{
    std::string line = vkp_push_kind_str(event.kind);
    if (event.kind == VKP_PUSH_PMESSAGE) {
        line += " " + event.pattern;
    }
    if (event.kind <= VKP_PUSH_UNSUBSCRIBED || event.kind == VKP_PUSH_OTHER ||
        event.kind == VKP_PUSH_REFUSED || event.kind == VKP_PUSH_LOST) {
        line += " " + event.channel;
    }
    if (event.kind <= VKP_PUSH_SMESSAGE) {
        line += " " + event.payload;
    }
    for (const std::string &name : event.names) {
        line += " " + name;
    }
    return line;
}

/* A client that keeps a copy of each push. All of it on the loop's thread. */
class vkp_test_client {
  public:
    vkp_test_client(vkp_loop *loop, vkp_client_config config, void *given = nullptr)
        : context(given)
    {
        config.on_push = [](void *user, const vkp_push *push) {
            auto *self = static_cast<vkp_test_client *>(user);
            self->events.push_back(vkp_test_event_of(*push));
            self->seen.fetch_add(1);
            if (self->hook) {
                self->hook(*push);
            }
        };
        config.user = this;
        if (vkp_client_open(loop, &config, &client_) != VKP_OK) {
            vkp_test_fail("no client to %s", config.address.ptr);
        }
    }
    ~vkp_test_client()
    {
        unref();
    }
    vkp_test_client(const vkp_test_client &) = delete;
    vkp_test_client &operator=(const vkp_test_client &) = delete;
    operator vkp_client *() const
    {
        return client_;
    }
    void unref()
    {
        vkp_client_unref(std::exchange(client_, nullptr));
    }
    vkp_client_state state() const
    {
        return vkp_client_get_state(client_);
    }
    vkp_client_stats stats() const
    {
        vkp_client_stats all;
        vkp_client_get_stats(client_, &all);
        return all;
    }
    std::string error() const
    {
        char text[128];
        vkp_client_get_error(client_, text, sizeof text);
        return text;
    }
    size_t count(vkp_push_kind kind) const
    {
        size_t found = 0;
        for (const vkp_test_event &event : events) {
            found += event.kind == kind ? 1 : 0;
        }
        return found;
    }
    /* All so far, as one line each, joined by ", ". */
    std::string history() const
    {
        std::string all;
        for (const vkp_test_event &event : events) {
            all += (all.empty() ? "" : ", ") + vkp_test_line(event);
        }
        return all;
    }
    void subscribe(const char *name, vkp_sub_kind kind = VKP_SUB_CHANNEL)
    {
        if (vkp_client_subscribe(client_, kind, vkp_str_of(name)) != VKP_OK) {
            vkp_test_fail("subscribe to %s failed", name);
        }
    }
    void unsubscribe(const char *name, vkp_sub_kind kind = VKP_SUB_CHANNEL)
    {
        if (vkp_client_unsubscribe(client_, kind, vkp_str_of(name)) != VKP_OK) {
            vkp_test_fail("unsubscribe from %s failed", name);
        }
    }

    std::vector<vkp_test_event> events;
    std::atomic<size_t> seen{0}; /* pushes, for other threads to wait for */
    std::function<void(const vkp_push &)> hook;
    void *context; /* for a config's on_connect */

  private:
    vkp_client *client_ = nullptr;
};

/* A value as text: "a" for strings, [..] arrays, {..} sets, <..> maps, error: ... */
inline std::string vkp_test_show(const vkp_value *value)
{
    std::string text;
    const char *brackets = value->type == VKP_RESP_SET   ? "{}"
                           : value->type == VKP_RESP_MAP ? "<>"
                                                         : "[]";
    switch (static_cast<vkp_resp_type>(value->type)) {
    case VKP_RESP_NULL:
        return "null";
    case VKP_RESP_STRING:
        return std::string(vkp_test_view(vkp_value_get_str(value)));
    case VKP_RESP_ERROR:
        return "error: " + std::string(vkp_test_view(vkp_value_get_str(value)));
    case VKP_RESP_INTEGER:
        return std::to_string(value->u.integer);
    case VKP_RESP_DOUBLE:
        return "double " + std::string(vkp_test_view(vkp_value_get_str(value)));
    case VKP_RESP_BOOL:
        return value->u.integer != 0 ? "true" : "false";
    case VKP_RESP_BIGNUM:
        return "big " + std::string(vkp_test_view(vkp_value_get_str(value)));
    case VKP_RESP_ARRAY:
    case VKP_RESP_SET:
    case VKP_RESP_PUSH:
    case VKP_RESP_MAP:
    case VKP_RESP_ATTRIBUTE:
        break;
    }
    for (const vkp_value *at = vkp_value_get_first(value); at != nullptr;
         at = vkp_value_get_next(value, at)) {
        text += (text.empty() ? "" : " ") + vkp_test_show(at);
    }
    return brackets[0] + text + brackets[1];
}

/* One command, its slot, its reply. */
class vkp_test_question {
  public:
    vkp_test_question() = default;
    vkp_test_question(vkp_client *client, std::initializer_list<const char *> words)
    {
        vkp_status status = send(client, words);
        if (status != VKP_OK) {
            vkp_test_fail("the command %s was not taken: %s", *words.begin(),
                          vkp_status_str(status));
        }
    }
    ~vkp_test_question()
    {
        if (open_) {
            vkp_oneshot_close(&slot_);
        }
        vkp_reply_unref(reply_);
    }
    vkp_test_question(const vkp_test_question &) = delete;
    vkp_test_question &operator=(const vkp_test_question &) = delete;
    vkp_status send(vkp_client *client, std::initializer_list<const char *> words)
    {
        std::vector<vkp_str> argv;
        for (const char *word : words) {
            argv.push_back(vkp_str_of(word));
        }
        vkp_status status = vkp_client_command_argv(client, &slot_, argv.size(), argv.data());
        open_ = status == VKP_OK;
        return status;
    }
    vkp_status recv(uint64_t deadline_ns = vkp_test_deadline())
    {
        open_ = false;
        forget();
        return vkp_oneshot_recv(&slot_, deadline_ns, &reply_);
    }
    vkp_status try_recv()
    {
        forget();
        vkp_status status = vkp_oneshot_try_recv(&slot_, &reply_);
        open_ = status == VKP_ERR_EMPTY;
        return status;
    }
    /* Runs the loop until there is an outcome. */
    vkp_status recv_on(vkp_loop *loop)
    {
        vkp_status status = VKP_ERR_EMPTY;
        vkp_test_run_until(loop, "a reply", [&] {
            status = try_recv();
            return status != VKP_ERR_EMPTY;
        });
        return status;
    }
    /* The reply, or the status that came instead of it. */
    std::string text_on(vkp_loop *loop)
    {
        vkp_status status = recv_on(loop);
        return status == VKP_OK ? text() : vkp_status_str(status);
    }
    std::string text() const
    {
        return reply_ ? vkp_test_show(vkp_reply_get_value(reply_)) : std::string("no reply");
    }
    const vkp_reply *reply() const
    {
        return reply_;
    }
    vkp_reply *take()
    {
        return std::exchange(reply_, nullptr);
    }

  private:
    void forget()
    {
        vkp_reply_unref(std::exchange(reply_, nullptr));
    }
    vkp_oneshot slot_;
    bool open_ = false;
    vkp_reply *reply_ = nullptr;
};

/* A command as it goes over the wire. */
inline std::string vkp_test_wire(const std::vector<std::string> &words)
{
    std::string text = "*" + std::to_string(words.size()) + "\r\n";
    for (const std::string &word : words) {
        text += "$" + std::to_string(word.size()) + "\r\n" + word + "\r\n";
    }
    return text;
}

/* vkp_client_send with its outcome written down. Keep it until on_reply was called. */
struct vkp_test_sending {
    int calls = 0;
    vkp_status status = VKP_OK;
    std::string text;
    std::string frame;
    std::function<void()> hook;

    vkp_status send(vkp_client *client, const std::string &commands, uint32_t replies)
    {
        vkp_bytes bytes;
        vkp_status made = vkp_bytes_copy(nullptr, commands.data(), commands.size(), &bytes);
        if (made != VKP_OK) {
            return made;
        }
        vkp_status sent = vkp_client_send(client, &bytes, replies, on_reply, this);
        vkp_bytes_unref(&bytes);
        return sent;
    }
    static void on_reply(void *user, vkp_status status, const vkp_value *value,
                         const vkp_bytes *frame)
    {
        auto *self = static_cast<vkp_test_sending *>(user);
        self->calls++;
        self->status = status;
        self->text = value ? vkp_test_show(value) : std::string("none");
        self->frame = frame ? std::string(reinterpret_cast<const char *>(frame->data), frame->len)
                            : std::string();
        if (self->hook) {
            self->hook();
        }
    }
};

/* A `done` of vkp_client_subscribe_then that writes down its outcome. */
struct vkp_test_done {
    int calls = 0;
    vkp_status status = VKP_ERR_EMPTY;
    std::string words;
    std::function<void()> hook;

    vkp_status subscribe(vkp_client *client, const char *name, vkp_sub_kind kind = VKP_SUB_CHANNEL)
    {
        return vkp_client_subscribe_then(client, kind, vkp_str_of(name), on_done, this);
    }
    static void on_done(void *user, vkp_status status, vkp_str words)
    {
        auto *self = static_cast<vkp_test_done *>(user);
        self->calls++;
        self->status = status;
        self->words = std::string(vkp_test_view(words));
        if (self->hook) {
            self->hook();
        }
    }
};

#endif /* VKP_TEST_CLIENT_PROBE_H */
