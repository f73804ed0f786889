/* A server that the test plays itself, over a real socket: it accepts, hears and says what the test
   wants. Client and server run in one thread, so that each order of events is chosen.
   SPDX-License-Identifier: MIT                                                                  */
#ifndef VKP_TEST_FAKE_SERVER_H
#define VKP_TEST_FAKE_SERVER_H

#include "support/client_probe.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

constexpr uint64_t ms = 1000000;

// The jitter of reconnects is chosen by the test.
inline uint64_t fixed_random = 1;

inline const vkp_sys *fixed_random_sys()
{
    static const vkp_sys table = [] {
        vkp_sys copy = *vkp_sys_get_default();
        copy.random_u64 = [] { return fixed_random; };
        return copy;
    }();
    return &table;
}

// With 1, and the limits of FakeServer::config, the next try is never in the round of the loss:
// the state between them can be seen.
class Loop : public vkp_test_loop {
  public:
    explicit Loop(const vkp_backend *backend = *vkp_test_backends(), uint64_t random = 1)
        : vkp_test_loop(backend, (fixed_random = random, fixed_random_sys()))
    {
    }
};

using Client = vkp_test_client;
using Question = vkp_test_question;
using Sending = vkp_test_sending;
using Done = vkp_test_done;

inline std::string wire(const std::vector<std::string> &words)
{
    return vkp_test_wire(words);
}

struct PeerDeleter {
    void operator()(vkp_test_peer *peer) const
    {
        vkp_test_peer_close(peer);
    }
};
using Peer = std::unique_ptr<vkp_test_peer, PeerDeleter>;

// HELLO's reply, which is also the answer to the fence behind UNSUBSCRIBE.
inline const char hello_reply[] = "%2\r\n$6\r\nserver\r\n$4\r\nfake\r\n$5\r\nproto\r\n:3\r\n";

// A listening socket; what is accepted there is played by the test.
class FakeServer {
  public:
    FakeServer() : path_(vkp_test_fresh_path("fake")), address_(std::string("unix:") + path_)
    {
        open();
    }
    ~FakeServer()
    {
        close();
    }
    FakeServer(const FakeServer &) = delete;
    FakeServer &operator=(const FakeServer &) = delete;
    void open()
    {
        sockaddr_un address = {};
        address.sun_family = AF_UNIX;
        std::strcpy(address.sun_path, path_);
        fd_ = socket(AF_UNIX, SOCK_STREAM, 0);
        if (fd_ < 0 || bind(fd_, reinterpret_cast<sockaddr *>(&address), sizeof address) != 0 ||
            listen(fd_, 64) != 0 || fcntl(fd_, F_SETFL, O_NONBLOCK) != 0) {
            vkp_test_fail("no socket at %s", path_);
        }
    }
    void close()
    {
        if (fd_ >= 0) {
            ::close(std::exchange(fd_, -1));
            unlink(path_);
        }
    }
    const char *address() const
    {
        return address_.c_str();
    }
    vkp_client_config config() const
    {
        vkp_client_config config = {};
        config.address = vkp_str_of(address());
        config.retry_min_ms = 1;
        config.retry_max_ms = 1;
        return config;
    }
    // Null while nobody is there.
    Peer try_accept()
    {
        int fd = ::accept(fd_, nullptr, nullptr);
        if (fd < 0) {
            return nullptr;
        }
        // Elsewhere than on Linux it inherits the listener's flag.
        (void)fcntl(fd, F_SETFL, 0);
        (void)fcntl(fd, F_SETFD, FD_CLOEXEC);
        return Peer(vkp_test_peer_of(fd));
    }
    Peer accept(vkp_loop *loop)
    {
        Peer peer;
        vkp_test_run_until(loop, "a connection", [&] {
            peer = try_accept();
            return peer != nullptr;
        });
        return peer;
    }
    // Accept and answer the plain HELLO 3.
    Peer greet(vkp_loop *loop)
    {
        Peer peer = accept(loop);
        if (vkp_test_frame_on(loop, peer.get()) != wire({"HELLO", "3"})) {
            vkp_test_fail("no HELLO 3");
        }
        vkp_test_peer_send_text(peer.get(), hello_reply);
        return peer;
    }
    Peer greet(vkp_loop *loop, const Client &client)
    {
        Peer peer = greet(loop);
        vkp_test_run_until(loop, "a ready client",
                           [&] { return client.state() == VKP_CLIENT_READY; });
        return peer;
    }

  private:
    const char *path_;
    std::string address_;
    int fd_ = -1;
};

inline void say(const Peer &peer, const std::string &bytes)
{
    if (!vkp_test_peer_send(peer.get(), bytes.data(), bytes.size())) {
        vkp_test_fail("the client hung up");
    }
}

inline std::string heard(vkp_loop *loop, const Peer &peer)
{
    return vkp_test_frame_on(loop, peer.get());
}

// Until the client closed its end.
inline void hung_up(vkp_loop *loop, const Peer &peer)
{
    if (!heard(loop, peer).empty()) {
        vkp_test_fail("a frame instead of the end");
    }
}

inline void until_state(vkp_loop *loop, const Client &client, vkp_client_state state)
{
    vkp_test_run_until(loop, "a state of the client", [&] { return client.state() == state; });
}

inline void until_events(vkp_loop *loop, const Client &client, size_t count)
{
    vkp_test_run_until(loop, "pushes", [&] { return client.events.size() >= count; });
}

inline std::string bulk(const std::string &text)
{
    return "$" + std::to_string(text.size()) + "\r\n" + text + "\r\n";
}

inline std::string push(const std::vector<std::string> &parts)
{
    std::string text = ">" + std::to_string(parts.size()) + "\r\n";
    for (const std::string &part : parts) {
        text += bulk(part);
    }
    return text;
}

// The confirmation of SUBSCRIBE and its like.
inline std::string confirm(const std::string &verb, const std::string &name, int count = 1)
{
    return ">3\r\n" + bulk(verb) + bulk(name) + ":" + std::to_string(count) + "\r\n";
}

// Confirm the SUBSCRIBE that comes next; returns its name.
inline std::string confirm_asked(vkp_loop *loop, const Peer &peer)
{
    const std::string frame = heard(loop, peer);
    const size_t at = frame.find("\r\n", frame.find("SUBSCRIBE\r\n$") + 11) + 2;
    const std::string name = frame.substr(at, frame.size() - 2 - at);
    if (frame != wire({"SUBSCRIBE", name})) {
        vkp_test_fail("no SUBSCRIBE of one name");
    }
    say(peer, confirm("subscribe", name));
    return name;
}

#endif /* VKP_TEST_FAKE_SERVER_H */
