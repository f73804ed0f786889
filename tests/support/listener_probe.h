/* What the tests of listeners share: every backend in turn, rounds of a loop, peers that close
   themselves, what the servers of these tests do with their connections.
   SPDX-License-Identifier: MIT                                                                  */
#ifndef VKP_TEST_LISTENER_PROBE_H
#define VKP_TEST_LISTENER_PROBE_H

#include "support/support.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

inline constexpr uint64_t vkp_test_ms = 1000000; /* in nanoseconds */

/* --------------------------------------------------------------------------------------
   Loops                                                                                     */

inline std::vector<const vkp_backend *> vkp_test_every_backend()
{
    std::vector<const vkp_backend *> found;
    for (const vkp_backend *const *at = vkp_test_backends_all(); *at != nullptr; at++) {
        found.push_back(*at);
    }
    return found;
}

/* At the start of a test case, which then runs once over each `backend`. */
#define VKP_TEST_ON_EVERY_BACKEND                                                \
    const vkp_backend *backend = GENERATE(from_range(vkp_test_every_backend())); \
    INFO("backend " << backend->name)

/* So many rounds that do not wait. */
inline void vkp_test_rounds(vkp_loop *loop, int count)
{
    for (int i = 0; i < count; i++) {
        if (vkp_loop_run_once(loop, 0) != VKP_OK) {
            vkp_test_fail("a round failed");
        }
    }
}

/* --------------------------------------------------------------------------------------
   Clients                                                                                   */

struct vkp_test_peer_deleter {
    void operator()(vkp_test_peer *peer) const
    {
        vkp_test_peer_close(peer);
    }
};
using vkp_test_peer_ptr = std::unique_ptr<vkp_test_peer, vkp_test_peer_deleter>;

inline vkp_test_peer_ptr vkp_test_peer_to(const std::string &address)
{
    return vkp_test_peer_ptr(vkp_test_peer_open(address.c_str()));
}

/* --------------------------------------------------------------------------------------
   Servers                                                                                   */

inline vkp_listener_stats vkp_test_listener_stats_of(const vkp_listener *listener)
{
    vkp_listener_stats stats;
    vkp_listener_get_stats(listener, &stats);
    return stats;
}

/* An on_data that sends back what it hears. */
inline size_t vkp_test_echo(vkp_conn *conn, void *, const vkp_bytes *in)
{
    return vkp_conn_send(conn, in) == VKP_OK ? in->len : 0;
}

/* For an on_close: the others stay, in any order. */
inline void vkp_test_forget_conn(std::vector<vkp_conn *> *conns, const vkp_conn *conn)
{
    for (vkp_conn *&each : *conns) {
        if (each == conn) {
            std::swap(each, conns->back());
            conns->pop_back();
            break;
        }
    }
}

/* Their on_close forgets each of them. */
inline void vkp_test_close_conns(std::vector<vkp_conn *> *conns)
{
    while (!conns->empty()) {
        vkp_conn_close(conns->back());
    }
}

#endif /* VKP_TEST_LISTENER_PROBE_H */
