/* What the tests of the relay share: a relay in this process, its loops in threads, its clients
   over real sockets; and the same bytes said to a relay and to its server, with the answers
   compared.
   SPDX-License-Identifier: MIT                                                                  */
#ifndef VKP_TEST_RELAY_PROBE_H
#define VKP_TEST_RELAY_PROBE_H

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "support/client_probe.h"
#include "support/sanitized.h"

namespace relay_probe {

using Strings = std::vector<std::string>;

// ---------------------------------------------------------------------------------------------
// Peers

struct PeerDeleter {
    void operator()(vkp_test_peer *peer) const
    {
        vkp_test_peer_close(peer);
    }
};
using Peer = std::unique_ptr<vkp_test_peer, PeerDeleter>;

inline Peer open(const std::string &address)
{
    return Peer(vkp_test_peer_open(address.c_str()));
}

inline void say(const Peer &peer, const std::string &bytes)
{
    if (!vkp_test_peer_send(peer.get(), bytes.data(), bytes.size())) {
        vkp_test_fail("the other side hung up on %.100s", bytes.c_str());
    }
}

inline std::string hear(const Peer &peer)
{
    return vkp_test_frame(peer.get());
}

// Until the other side closed.
inline Strings hear_all(const Peer &peer)
{
    Strings frames;
    for (std::string frame = hear(peer); !frame.empty(); frame = hear(peer)) {
        frames.push_back(frame);
    }
    return frames;
}

inline Strings hear_some(const Peer &peer, size_t count)
{
    Strings frames;
    while (frames.size() < count) {
        frames.push_back(hear(peer));
    }
    return frames;
}

template <typename... Words>
std::string ask(const Peer &peer, const Words &...words)
{
    return vkp_test_ask(peer.get(), words...);
}

// "SET k v" as it goes over the wire; words are separated by single blanks.
inline std::string wire(const std::string &command)
{
    Strings words;
    std::istringstream in(command);
    for (std::string word; in >> word;) {
        words.push_back(word == "\"\"" ? std::string() : word);
    }
    return vkp_test_wire(words);
}

inline std::string wires(const Strings &commands)
{
    std::string all;
    for (const std::string &command : commands) {
        all += wire(command);
    }
    return all;
}

inline std::string bulk(const std::string &text)
{
    return "$" + std::to_string(text.size()) + "\r\n" + text + "\r\n";
}

inline std::string message(int protocol, const std::string &channel, const std::string &payload)
{
    return (protocol == 3 ? ">3\r\n" : "*3\r\n") + bulk("message") + bulk(channel) + bulk(payload);
}

inline std::string confirmation(int protocol, const std::string &verb, const std::string &name,
                                size_t count)
{
    return (protocol == 3 ? ">3\r\n" : "*3\r\n") + bulk(verb) + bulk(name) + ":" +
           std::to_string(count) + "\r\n";
}

inline bool starts_with(const std::string &text, const std::string &prefix)
{
    return text.compare(0, prefix.size(), prefix) == 0;
}

inline bool ends_with(const std::string &text, const std::string &end)
{
    return text.size() >= end.size() &&
           text.compare(text.size() - end.size(), end.size(), end) == 0;
}

inline bool contains(const std::string &text, const std::string &part)
{
    return text.find(part) != std::string::npos;
}

// ---------------------------------------------------------------------------------------------
// Relays

struct Setup {
    const vkp_backend *backend;
    size_t loops;
};

inline std::ostream &operator<<(std::ostream &out, const Setup &setup)
{
    return out << setup.backend->name << " with " << setup.loops << " loops";
}

inline Setup one_loop()
{
    return {vkp_test_backends()[0], 1};
}

// One loop, and several; under ThreadSanitizer only several, which have more to show.
inline std::vector<Setup> setups()
{
    std::vector<Setup> all;
    for (const vkp_backend *const *each = vkp_test_backends(); *each; each++) {
#if !VKP_TEST_TSAN
        all.push_back({*each, 1});
#endif
        all.push_back({*each, 3});
    }
    return all;
}

#define EVERY_SETUP()                                   \
    const Setup setup = GENERATE(from_range(setups())); \
    INFO(setup)

using Catch::Generators::from_range;

inline vkp_relay_config upstream_of(const char *address)
{
    vkp_relay_config config = {};
    config.server = vkp_str_of(address);
    return config;
}

// A relay on loops of its own, each in a thread. At its end nothing of it may be left: no
// descriptor, no file, no block.
class Relay {
  public:
    explicit Relay(const Setup &setup, vkp_relay_config config = {}, const vkp_sys *sys = nullptr)
    {
        vkp_test_env_init(&test);
        for (size_t i = 0; i < setup.loops; i++) {
            loops_.push_back(std::make_unique<vkp_test_loop>(setup.backend, sys));
            views_.push_back(*loops_.back());
        }
        config.loops = views_.data();
        config.loop_count = views_.size();
        config.env = &test.env;
        const char *bound = nullptr;
        const char *wanted = vkp_test_fresh_address("relay");
        if (vkp_relay_open(&config, &relay_) != VKP_OK ||
            vkp_relay_listen(relay_, vkp_str_of(wanted), &bound) != VKP_OK) {
            vkp_test_fail("no relay at %s", wanted);
        }
        address = bound;
        for (vkp_loop *loop : views_) {
            threads_.push_back(std::make_unique<vkp_test_loop_thread>(loop));
        }
    }
    ~Relay()
    {
        let_go();
        for (vkp_loop *loop : views_) { // what is queued on one may hold all of them
            vkp_loop_close(loop);
        }
        while (!loops_.empty()) {
            loops_.pop_back();
        }
        if (vkp_test_exists(address.c_str() + 5)) {
            vkp_test_fail("%s is left", address.c_str());
        }
        vkp_test_env_deinit(&test);
    }
    Relay(const Relay &) = delete;
    Relay &operator=(const Relay &) = delete;
    operator vkp_relay *() const
    {
        return relay_;
    }
    void let_go()
    {
        threads_.clear();
        vkp_relay_unref(std::exchange(relay_, nullptr));
    }
    vkp_relay_stats stats() const
    {
        vkp_relay_stats stats;
        vkp_relay_get_stats(relay_, &stats);
        return stats;
    }
    std::string log()
    {
        std::string all;
        char line[600];
        for (size_t i = 0; i < vkp_test_env_log_count(&test); i++) {
            vkp_test_env_log_line(&test, i, line, sizeof line);
            all += std::string(line) + "\n";
        }
        return all;
    }
    // Run it on loop 0's thread, and wait for it.
    template <typename Call>
    void on_loop(Call call)
    {
        struct Job {
            Call call;
            std::atomic<bool> done;
        } job = {call, {false}};
        auto run = [](void *user) {
            auto *self = static_cast<Job *>(user);
            self->call();
            self->done = true;
        };
        if (vkp_loop_post(views_[0], run, &job) != VKP_OK) {
            vkp_test_fail("nothing can be posted");
        }
        vkp_test_wait_until("a call on loop 0", [&] { return job.done.load(); });
    }
    Peer client() const
    {
        return open(address);
    }
    // One on each loop: connections are spread in turn.
    std::vector<Peer> client_per_loop() const
    {
        std::vector<Peer> all;
        for (size_t i = 0; i < views_.size(); i++) {
            all.push_back(client());
            ask(all.back(), "PING");
        }
        return all;
    }
    // A client to whom the upstream server answers.
    Peer connected_client() const
    {
        Peer peer = client();
        until_connected(peer);
        return peer;
    }
    static void until_connected(const Peer &peer)
    {
        vkp_test_wait_until("the upstream server",
                            [&] { return ask(peer, "ECHO", "there") == "$5\r\nthere\r\n"; });
    }

    std::string address;
    vkp_test_env test;

  private:
    std::vector<std::unique_ptr<vkp_test_loop>> loops_;
    std::vector<vkp_loop *> views_;
    std::vector<std::unique_ptr<vkp_test_loop_thread>> threads_;
    vkp_relay *relay_ = nullptr;
};

// One relay on a loop whose time the test moves.
class StillRelay {
  public:
    explicit StillRelay(vkp_relay_config config, const vkp_sys *sys = nullptr)
        : loop(&vkp_backend_null, sys)
    {
        view_ = loop;
        config.loops = &view_;
        config.loop_count = 1;
        config.env = &loop.test.env;
        address = vkp_test_fresh_address("still");
        if (vkp_relay_open(&config, &relay_) != VKP_OK ||
            vkp_relay_listen(relay_, vkp_str_of(address.c_str()), nullptr) != VKP_OK) {
            vkp_test_fail("no relay at %s", address.c_str());
        }
    }
    ~StillRelay()
    {
        vkp_relay_unref(relay_);
    }
    StillRelay(const StillRelay &) = delete;
    StillRelay &operator=(const StillRelay &) = delete;
    operator vkp_relay *() const
    {
        return relay_;
    }
    vkp_relay_stats stats() const
    {
        vkp_relay_stats stats;
        vkp_relay_get_stats(relay_, &stats);
        return stats;
    }
    // What a new client is told when it asks, or without that.
    std::string knock(Peer *peer)
    {
        *peer = open(address);
        (void)vkp_test_peer_send_text(peer->get(), "PING\r\n"); // it may be closed
        return vkp_test_frame_on(loop, peer->get());
    }
    void leave(Peer *peer)
    {
        const size_t before = stats().clients;
        peer->reset();
        vkp_test_run_until(loop, "a client to go", [&] { return stats().clients < before; });
    }
    void pass(uint64_t ms)
    {
        const uint64_t until = loop.now() + ms * 1000000;
        while (loop.now() < until) {
            loop.round(until);
        }
    }

    vkp_test_loop loop;
    std::string address;

  private:
    vkp_loop *view_ = nullptr;
    vkp_relay *relay_ = nullptr;
};

struct ServerDeleter {
    void operator()(vkp_test_server *server) const
    {
        vkp_test_server_close(server);
    }
};
using Server = std::unique_ptr<vkp_test_server, ServerDeleter>;

inline Server start_server(std::vector<const char *> options = {})
{
    options.push_back(nullptr);
    return Server(vkp_test_server_open(options.data()));
}

#define NEEDS_SERVER()                                                   \
    if (vkp_test_server_program() == nullptr) {                          \
        WARN("left out: there is no valkey-server and no redis-server"); \
        return;                                                          \
    }

inline size_t numsub(const Peer &direct, const std::string &name)
{
    std::string reply = ask(direct, "PUBSUB", "NUMSUB", name);
    return std::stoul(reply.substr(reply.rfind(':') + 1));
}

// How many connections of a relay the server has.
inline size_t relay_connections(const Peer &direct)
{
    const std::string list = ask(direct, "CLIENT", "LIST");
    size_t count = 0;
    for (size_t at = list.find("name=valkey-push-relay "); at != std::string::npos;
         at = list.find("name=valkey-push-relay ", at + 1)) {
        count++;
    }
    return count;
}

inline void until_numsub(const Peer &direct, const std::string &name, size_t count)
{
    vkp_test_wait_until("the server's count of subscribers",
                        [&] { return numsub(direct, name) == count; });
}

// ---------------------------------------------------------------------------------------------
// The same bytes to the relay and to the server

// What may differ: who the server is, and ids.
inline std::string normalised(const std::string &frame)
{
    if ((starts_with(frame, "%7") || starts_with(frame, "*14")) && contains(frame, "proto")) {
        return frame.substr(0, frame.find('\r')) + " hello" +
               frame.substr(frame.find("proto") + 5, 6);
    }
    return frame;
}

inline Strings transcript(const std::string &address, const std::string &script, size_t piece)
{
    Peer peer = open(address);
    std::string all = script + wire("QUIT");
    // Unix sockets keep no borders between writes, but a reader that is awake sees most of them. A
    // script may end the connection before it is all sent.
    for (size_t at = 0; at < all.size(); at += piece) {
        std::string part = all.substr(at, piece);
        (void)vkp_test_peer_send(peer.get(), part.data(), part.size());
    }
    Strings frames = hear_all(peer);
    for (std::string &frame : frames) {
        frame = normalised(frame);
    }
    return frames;
}

// Replies may be long: what stands around the first difference.
inline std::string excerpt(const std::string &text, size_t at)
{
    return text.substr(at < 60 ? 0 : at - 60, 100);
}

// valkey 8.0 has an error where all others confirm that nothing was left.
inline bool is_same(const std::string &server, const std::string &relay)
{
    return server == relay ||
           (starts_with(server, "-NOSUB ") && contains(relay, "unsubscribe\r\n"));
}

inline void compare(const Strings &server, const Strings &relay)
{
    size_t i = 0;
    while (i < std::min(server.size(), relay.size()) && is_same(server[i], relay[i])) {
        i++;
    }
    if (i < server.size() && i < relay.size()) {
        size_t at = 0;
        while (at < server[i].size() && at < relay[i].size() && server[i][at] == relay[i][at]) {
            at++;
        }
        INFO("the first difference is in frame " << i << " at byte " << at);
        CHECK(excerpt(relay[i], at) == excerpt(server[i], at));
    }
    CHECK(relay.size() == server.size());
    CHECK(server.size() > 1);
}

class Differential {
  public:
    explicit Differential(const Setup &setup)
        : server_(start_server({"--enable-debug-command", "yes"})),
          relay_(setup, upstream_of(vkp_test_server_unix(server_.get())))
    {
        relay_.connected_client();
    }
    void run(const std::string &script, size_t piece = SIZE_MAX)
    {
        INFO("script:\n" << script.substr(0, 2000));
        flush();
        Strings direct = transcript(vkp_test_server_unix(server_.get()), script, SIZE_MAX);
        flush();
        Strings relayed = transcript(relay_.address, script, std::min(piece, script.size()));
        compare(direct, relayed);
    }
    // Whether the server's first reply begins with this: what servers do not agree on.
    bool answers(const std::string &script, const char *begin) const
    {
        const Strings frames = transcript(vkp_test_server_unix(server_.get()), script, SIZE_MAX);
        return !frames.empty() && starts_with(frames[0], begin);
    }
    // In both protocols.
    void run_both(const std::string &script, size_t piece = SIZE_MAX)
    {
        run(wire("HELLO 2") + script, piece);
        run(wire("HELLO 3") + script, piece);
    }

  private:
    void flush()
    {
        Peer direct = open(vkp_test_server_unix(server_.get()));
        ask(direct, "FLUSHALL");
        ask(direct, "SCRIPT", "FLUSH");
    }
    Server server_;
    Relay relay_;
};

} // namespace relay_probe

#endif
