/* A real server that the test starts, and questions to it over a connection of the test's own.
   SPDX-License-Identifier: MIT                                                                  */
#ifndef VKP_TEST_REAL_SERVER_H
#define VKP_TEST_REAL_SERVER_H

#include "support/client_probe.h"

#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

using Loop = vkp_test_loop;
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

class Server {
  public:
    Server(std::initializer_list<const char *> options = {})
    {
        std::vector<const char *> all(options);
        all.push_back(nullptr);
        server_ = vkp_test_server_open(all.data());
    }
    ~Server()
    {
        vkp_test_server_close(server_);
    }
    Server(const Server &) = delete;
    Server &operator=(const Server &) = delete;
    operator vkp_test_server *() const
    {
        return server_;
    }
    vkp_client_config config(bool tcp = false) const
    {
        vkp_client_config config = {};
        config.address =
            vkp_str_of(tcp ? vkp_test_server_tcp(server_) : vkp_test_server_unix(server_));
        config.retry_min_ms = 1;
        config.retry_max_ms = 10;
        return config;
    }
    Peer peer() const
    {
        return Peer(vkp_test_peer_open(vkp_test_server_unix(server_)));
    }

  private:
    vkp_test_server *server_;
};

#define NEEDS_A_SERVER                                                         \
    if (!vkp_test_server_program()) {                                          \
        WARN("neither valkey-server nor redis-server is on PATH: not tested"); \
        return;                                                                \
    }

template <typename... Words>
inline std::string ask(const Peer &peer, const Words &...words)
{
    return vkp_test_ask(peer.get(), words...);
}

// How many connections the server has for a name, by its own word.
inline std::string subscribers(const Peer &peer, const std::string &name)
{
    const std::string reply = ask(peer, "PUBSUB", "NUMSUB", name);
    const size_t colon = reply.rfind(':');
    return colon == std::string::npos ? reply : reply.substr(colon + 1, reply.size() - colon - 3);
}

inline void until_ready(vkp_loop *loop, const Client &client)
{
    vkp_test_run_until(loop, "a connection", [&] { return client.state() == VKP_CLIENT_READY; });
}

// Until what was asked before has been done by the server and told here.
inline void fence(vkp_loop *loop, const Client &client)
{
    Question question(client, {"PING"});
    if (question.recv_on(loop) != VKP_OK) {
        vkp_test_fail("no answer to the fence");
    }
}

inline std::string bulk(const std::string &text)
{
    return "$" + std::to_string(text.size()) + "\r\n" + text + "\r\n";
}

#endif /* VKP_TEST_REAL_SERVER_H */
