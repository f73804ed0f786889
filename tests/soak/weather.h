// SPDX-License-Identifier: MIT
//
// A real server of a soak: a thread that publishes numbers to it, and an adversary that kills
// connections, pauses and restarts the server, changes rights and limits, and lets it be busy.
#ifndef VKP_TEST_SOAK_WEATHER_H
#define VKP_TEST_SOAK_WEATHER_H

#include "soak/account.h"
#include "support/fake_server.h"

#include <atomic>
#include <thread>

#include <poll.h>
#include <signal.h>

namespace soak {

class Weather {
  public:
    Weather(const std::string &name, uint64_t seed, uint64_t rate) : random_(seed), rate_(rate)
    {
        const std::string file = name + ".rdb";
        const char *options[] = {"--enable-debug-command",
                                 "local",
                                 "--lua-time-limit",
                                 "20",
                                 "--key-load-delay",
                                 "100",
                                 "--loading-process-events-interval-bytes",
                                 "1024",
                                 "--dbfilename",
                                 file.c_str(),
                                 "--user",
                                 "ann",
                                 "on",
                                 ">pw",
                                 "~*",
                                 "&*",
                                 "+@all",
                                 nullptr};
        server_ = vkp_test_server_open(options);
        // What a server loads when it is started again, for some tenths of a second.
        (void)ask({"DEBUG", "POPULATE", "2000"});
        (void)ask({"SAVE"});
    }
    ~Weather()
    {
        stop();
        admin_.reset();
        busy_.reset();
        vkp_test_server_close(server_);
    }
    Weather(const Weather &) = delete;
    Weather &operator=(const Weather &) = delete;
    vkp_client_config config(bool tcp) const
    {
        vkp_client_config config = {};
        config.address =
            vkp_str_of(tcp ? vkp_test_server_tcp(server_) : vkp_test_server_unix(server_));
        config.username = vkp_str_of("ann");
        config.password = vkp_str_of("pw");
        config.retry_min_ms = 1;
        config.retry_max_ms = 50;
        return config;
    }
    void watch(const Account *account)
    {
        accounts_.push_back(account);
    }
    // No connection of the adversary is left.
    void rest()
    {
        admin_.reset();
    }
    // The publisher.
    void start()
    {
        thread_ = std::thread([this] { publish_all(); });
    }
    void stop()
    {
        stopped_ = true;
        if (thread_.joinable()) {
            thread_.join();
        }
    }
    // What the adversary does now; in the thread that made this, which starts the server.
    void act(uint64_t now);
    // All is well again, and each subscriber connects anew.
    void calm();
    uint64_t faults() const
    {
        return count_;
    }
    Ledger ledger;

  private:
    enum Fault {
        KILL_SUBSCRIBERS,
        KILL_ONE,
        KILL_OTHERS, // the publisher is among them
        PAUSE,
        CRASH,
        TERMINATE,
        FREEZE,
        REVOKE,
        FLOOD,  // above the limit of the output buffer
        SLEEP,  // nothing is answered
        SCRIPT, // everything is answered BUSY, and subscribers have to connect
        RELOAD, // everything is answered LOADING
        FAULTS,
        NO_FAULT
    };
    void begin(Fault fault);
    void end();
    void kill_one();
    void interrupt();
    bool open_busy();
    std::string ask(const std::vector<std::string> &words);
    bool tell(const Peer &peer, const std::vector<std::string> &words);
    void publish_all();
    void publish(Peer &peer);
    void pace();
    uint64_t lag() const;

    Random random_;
    const uint64_t rate_; // numbers in a second
    vkp_test_server *server_ = nullptr;
    Peer admin_; // none while the server is down
    Peer busy_;  // what keeps the server busy
    Fault fault_ = NO_FAULT;
    uint64_t next_ns_ = 0; // when the fault ends, or the next one begins
    uint64_t count_ = 0;
    std::vector<const Account *> accounts_;
    Random sizes_{1}; // the publisher's
    uint64_t published_ns_ = 0;
    std::atomic<bool> stopped_{false};
    std::thread thread_;
};

// ---------------------------------------------------------------------------------------------
// The publisher

inline uint64_t Weather::lag() const
{
    const uint64_t begun = ledger.begun();
    uint64_t most = 0;
    for (const Account *each : accounts_) {
        most = std::max(most, each->lag(begun));
    }
    return most;
}

// Until the next numbers are due. Where clients are far behind, a little longer.
inline void Weather::pace()
{
    const uint64_t latest = vkp_now_ns() + 200 * ms;
    while (!stopped_ && vkp_now_ns() < published_ns_) {
        (void)poll(nullptr, 0, 1);
    }
    while (!stopped_ && vkp_now_ns() < latest && lag() > 20000) {
        (void)poll(nullptr, 0, 1);
    }
    published_ns_ = std::max(published_ns_, vkp_now_ns() - 100 * ms); // at most so far behind
}

inline void Weather::publish_all()
{
    Peer peer;
    published_ns_ = vkp_now_ns();
    while (!stopped_) {
        if (!peer) {
            const int fd = vkp_test_connect(vkp_test_server_unix(server_));
            if (fd < 0) {
                (void)poll(nullptr, 0, 1);
                continue;
            }
            peer.reset(vkp_test_peer_of(fd));
        }
        pace();
        publish(peer);
    }
}

// A pipeline of some numbers. What has no reply may have been published or not.
inline void Weather::publish(Peer &peer)
{
    const uint64_t count = sizes_.between(1, 40);
    const uint64_t first = ledger.begin(count);
    std::vector<bool> taken(count, false);
    std::string text;
    for (uint64_t number = first; number < first + count; number++) {
        const Stream &stream = streams[number % stream_count];
        text += wire({stream.shard ? "SPUBLISH" : "PUBLISH", stream.name, payload_of(number)});
    }
    bool sent = vkp_test_peer_send(peer.get(), text.data(), text.size());
    for (uint64_t i = 0; sent && i < count; i++) {
        size_t len = 0;
        const char *reply = vkp_test_peer_read_frame(peer.get(), &len);
        sent = reply != nullptr;
        taken[i] = sent && reply[0] == ':';
    }
    ledger.settle(taken);
    published_ns_ += count * second / rate_;
    if (!sent) {
        peer.reset();
    }
}

// ---------------------------------------------------------------------------------------------
// The adversary

// A command of the adversary; "" without an answer.
inline std::string Weather::ask(const std::vector<std::string> &words)
{
    if (!admin_) {
        const int fd = vkp_test_connect(vkp_test_server_unix(server_));
        if (fd < 0) {
            return "";
        }
        admin_.reset(vkp_test_peer_of(fd));
    }
    const std::string reply = tell(admin_, words) ? vkp_test_frame(admin_.get()) : "";
    if (reply.empty()) {
        admin_.reset();
    }
    return reply;
}

inline bool Weather::tell(const Peer &peer, const std::vector<std::string> &words)
{
    const std::string text = wire(words);
    return vkp_test_peer_send(peer.get(), text.data(), text.size());
}

inline bool Weather::open_busy()
{
    const int fd = vkp_test_connect(vkp_test_server_unix(server_));
    if (fd >= 0) {
        busy_.reset(vkp_test_peer_of(fd));
    }
    return fd >= 0;
}

inline void Weather::kill_one()
{
    const std::string all = ask({"CLIENT", "LIST", "TYPE", "pubsub"});
    std::vector<std::string> ids;
    for (size_t at = all.find("id="); at != std::string::npos; at = all.find("\nid=", at)) {
        at = all.find('=', at) + 1;
        ids.push_back(all.substr(at, all.find(' ', at) - at));
    }
    if (!ids.empty()) {
        (void)ask({"CLIENT", "KILL", "ID", ids[random_.below(ids.size())]});
    }
}

// long: one case for each fault.
inline void Weather::begin(Fault fault)
{
    uint64_t length_ms = 0;
    switch (fault) {
    case KILL_SUBSCRIBERS:
        (void)ask({"CLIENT", "KILL", "TYPE", "pubsub"});
        break;
    case KILL_ONE:
        kill_one();
        break;
    case KILL_OTHERS:
        (void)ask({"CLIENT", "KILL", "TYPE", "normal"});
        break;
    case PAUSE:
        length_ms = random_.between(10, 800);
        (void)ask(
            {"CLIENT", "PAUSE", std::to_string(length_ms), random_.one_in(2) ? "ALL" : "WRITE"});
        break;
    case CRASH:
        vkp_test_server_kill(server_);
        admin_.reset();
        length_ms = random_.between(0, 300);
        break;
    case TERMINATE:
        vkp_test_server_stop(server_, SIGTERM);
        admin_.reset();
        length_ms = random_.between(0, 300);
        break;
    case FREEZE:
        (void)kill(vkp_test_server_pid(server_), SIGSTOP);
        length_ms = random_.between(10, 1500);
        break;
    case REVOKE: {
        std::vector<std::string> words = {"ACL", "SETUSER", "ann", "resetchannels", "&fill"};
        for (const char *each : {"&a*", "&a0", "&a1", "&b*", "&b0", "&s0"}) {
            if (random_.one_in(2)) {
                words.push_back(each);
            }
        }
        (void)ask(words);
        length_ms = random_.between(10, 2000);
        break;
    }
    case FLOOD:
        (void)ask({"CONFIG", "SET", "client-output-buffer-limit", "pubsub 65536 0 0"});
        (void)ask({"PUBLISH", filler, std::string(200000, 'x')});
        length_ms = random_.between(10, 300);
        break;
    case SLEEP: {
        length_ms = random_.between(10, 1500);
        const std::string seconds = std::to_string(static_cast<double>(length_ms) / 1000);
        if (open_busy()) {
            (void)tell(busy_, {"DEBUG", "SLEEP", seconds});
        }
        break;
    }
    case SCRIPT:
        if (open_busy()) {
            const std::string both = wire({"CLIENT", "KILL", "TYPE", "pubsub"}) +
                                     wire({"EVAL", "while true do end", "0"});
            (void)vkp_test_peer_send(busy_.get(), both.data(), both.size());
        }
        length_ms = random_.between(30, 1000);
        break;
    case RELOAD:
        if (open_busy()) {
            (void)tell(busy_, {"DEBUG", "RELOAD"});
        }
        length_ms = random_.between(10, 300);
        break;
    case FAULTS:
    case NO_FAULT:
        break;
    }
    fault_ = fault;
    count_++;
    next_ns_ = vkp_now_ns() + length_ms * ms;
}

// The script ends; it may not have begun yet.
inline void Weather::interrupt()
{
    size_t len = 0;
    vkp_test_wait_until("the end of the script", [&] {
        (void)ask({"SCRIPT", "KILL"});
        const char *reply = vkp_test_peer_try_read_frame(busy_.get(), &len);
        return vkp_test_peer_is_ended(busy_.get()) || (reply != nullptr && reply[0] == '-');
    });
}

// The fault is over: what it changed is as it was.
inline void Weather::end()
{
    switch (fault_) {
    case CRASH:
    case TERMINATE:
        vkp_test_server_restart(server_);
        break;
    case FREEZE:
        (void)kill(vkp_test_server_pid(server_), SIGCONT);
        break;
    case REVOKE:
        (void)ask({"ACL", "SETUSER", "ann", "allchannels"});
        break;
    case FLOOD:
        (void)ask({"CONFIG", "SET", "client-output-buffer-limit", "pubsub 33554432 8388608 60"});
        break;
    case SCRIPT:
        if (busy_) {
            interrupt();
        }
        break;
    case SLEEP:
    case RELOAD:
        if (busy_) {
            (void)vkp_test_frame(busy_.get());
        }
        break;
    case KILL_SUBSCRIBERS:
    case KILL_ONE:
    case KILL_OTHERS:
    case PAUSE:
    case FAULTS:
    case NO_FAULT:
        break;
    }
    busy_.reset();
    fault_ = NO_FAULT;
    next_ns_ = vkp_now_ns() + random_.between(100, 1500) * ms;
}

inline void Weather::act(uint64_t now)
{
    if (now < next_ns_) {
        return;
    }
    if (fault_ != NO_FAULT) {
        end();
    } else {
        begin(static_cast<Fault>(random_.below(FAULTS)));
    }
}

inline void Weather::calm()
{
    if (fault_ != NO_FAULT) {
        end();
    }
    // A name that was refused is asked for at once on a new connection.
    (void)ask({"CLIENT", "KILL", "TYPE", "pubsub"});
}

} // namespace soak

#endif // VKP_TEST_SOAK_WEATHER_H
