// SPDX-License-Identifier: MIT
//
// Clients of each kind in heavy traffic, with a server that misbehaves at random and two real ones
// that are killed, paused, restarted and changed. At the end the books balance: each message that
// was published to a subscribed name arrived once and in order or lies in a GAP that covers the
// name, each reply is at its asker, there is one DISCONNECTED for each outage and a GAP behind it,
// and memory and descriptors are where they were. Some seconds of it, or as many minutes as
// VKP_TEST_SOAK_MINUTES says; VKP_TEST_SEED repeats the choices of a run, not its timing.
#include "support/catch.hpp"

#include "soak/account.h"
#include "soak/ledger.h"
#include "soak/players.h"
#include "soak/scripted.h"
#include "soak/weather.h"
#include "support/sanitized.h"

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>

#include <sys/resource.h>

namespace soak {
namespace {

constexpr double seconds_of_a_gate = 4;
constexpr uint64_t rate = 2500; // numbers in a second, of each server

double seconds()
{
    const char *minutes = std::getenv("VKP_TEST_SOAK_MINUTES");
    const double wanted = minutes != nullptr ? std::strtod(minutes, nullptr) * 60 : 0;
    return wanted > 0 ? wanted : seconds_of_a_gate;
}

uint64_t seed()
{
    const char *text = std::getenv("VKP_TEST_SEED");
    return text != nullptr && *text != '\0' ? std::strtoull(text, nullptr, 10)
                                            : vkp_now_ns() / ms % 1000000007;
}

// Resident memory of this process in KiB: now on Linux, its peak elsewhere.
long resident_kib()
{
    long total = 0;
    long pages = 0;
    std::FILE *file = std::fopen("/proc/self/statm", "r");
    if (file != nullptr) {
        const bool known = std::fscanf(file, "%ld %ld", &total, &pages) == 2;
        std::fclose(file);
        if (known) {
            return pages * (sysconf(_SC_PAGESIZE) / 1024);
        }
    }
    struct rusage usage;
    (void)getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    return usage.ru_maxrss / 1024;
#else
    return usage.ru_maxrss;
#endif
}

class Soak {
  public:
    explicit Soak(uint64_t seed);
    ~Soak();
    // The whole of it; false when something went wrong, which faults() says.
    bool run(double for_seconds);
    std::string faults() const
    {
        return faults_.text();
    }
    void report(uint64_t seed) const;
    void check(double for_seconds) const;
    size_t live_bytes_before = 0;
    size_t live_bytes_after = 0;

  private:
    struct Tick {
        vkp_timer timer;
        Soak *soak;
    };
    bool until(const char *what, const std::function<bool()> &condition);
    bool all(const std::function<bool(Player &)> &condition);
    void cast_scripted(uint64_t seed);
    void cast_real(Weather &weather, const std::string &name, bool tcp, uint64_t seed);
    void adversity(uint64_t until_ns);
    bool settle();
    void end();
    Account::Totals totals() const;
    static void on_tick(vkp_timer *timer);

    Faults faults_;
    vkp_test_loop loop_;
    Stage stage_{loop_, &loop_.test.env, faults_};
    Scripted scripted_;
    std::vector<std::unique_ptr<Weather>> weather_;
    std::vector<std::unique_ptr<Player>> players_;
    Tick tick_ = {{}, this};
    uint64_t begun_ns_ = vkp_now_ns();
    std::unique_ptr<vkp_test_loop_thread> thread_;
    std::vector<vkp_client_stats> stats_; // of the players, at the end
};

const std::vector<Subscription> everything = {{VKP_SUB_CHANNEL, "a0"},
                                              {VKP_SUB_CHANNEL, "b0"},
                                              {VKP_SUB_PATTERN, "a*"},
                                              {VKP_SUB_SHARD, "s0"}};
const std::vector<Subscription> others = {
    {VKP_SUB_PATTERN, "b*"}, {VKP_SUB_CHANNEL, "a1"}, {VKP_SUB_SHARD, "s0"}};

// Short, so that much happens in a soak; a real server may be busy for longer than a second.
vkp_client_config hasty(vkp_client_config config, int protocol)
{
    config.protocol = protocol;
    config.retry_min_ms = 1;
    config.retry_max_ms = 50;
    config.connect_timeout_ms = 2000;
    config.heartbeat_ms = 300;
    config.reply_timeout_ms = 1000;
    config.blocked_timeout_ms = 3000;
    return config;
}

Soak::Soak(uint64_t seed) : scripted_(seed, rate)
{
    loop_.test.env.log = nullptr;
    cast_scripted(seed);
    for (uint64_t i = 0; vkp_test_server_program() != nullptr && i < 2; i++) {
        const std::string name = i == 0 ? "first" : "second";
        weather_.push_back(std::make_unique<Weather>("soak-" + name, seed + 100 + i, rate));
        cast_real(*weather_.back(), name, i != 0, seed + 10 * (i + 1));
    }
}

Soak::~Soak()
{
    end();
}

void Soak::cast_scripted(uint64_t seed)
{
    const auto role = [&](const char *who, const std::vector<Subscription> &names, bool asks,
                          int protocol) {
        return Role{who, scripted_.ledger, hasty(scripted_.listen(asks), protocol), names, asks,
                    true};
    };
    players_.push_back(
        std::make_unique<Caller>(stage_, role("scripted asker", everything, true, 3), seed + 1));
    players_.push_back(std::make_unique<Caller>(
        stage_, role("scripted subscriber", everything, false, 3), seed + 2));
    players_.push_back(
        std::make_unique<Caller>(stage_, role("scripted resp2", others, false, 2), seed + 3));
    players_.push_back(
        std::make_unique<Receiver>(stage_, role("scripted channel", others, true, 3)));
    for (const std::unique_ptr<Player> &each : players_) {
        scripted_.watch(&each->account);
    }
}

void Soak::cast_real(Weather &weather, const std::string &name, bool tcp, uint64_t seed)
{
    const size_t before = players_.size();
    const auto role = [&](const char *what, std::vector<Subscription> names, bool asks,
                          int protocol) {
        names.push_back({VKP_SUB_CHANNEL, filler});
        return Role{name + what, weather.ledger, hasty(weather.config(tcp), protocol),
                    names,       asks,           false};
    };
    Role asker = role(" asker", {}, true, 2);
    asker.names.clear(); // in RESP2 a connection has either names or commands
    players_.push_back(
        std::make_unique<Caller>(stage_, role(" resp3", everything, true, 3), seed + 1));
    players_.push_back(
        std::make_unique<Caller>(stage_, role(" resp2", others, false, 2), seed + 2));
    players_.push_back(std::make_unique<Caller>(stage_, asker, seed + 3));
    players_.push_back(std::make_unique<Receiver>(stage_, role(" channel", everything, true, 3)));
    if (!tcp) {
        players_.push_back(std::make_unique<Waiter>(stage_, role(" sync", others, true, 3)));
    }
    for (size_t i = before; i < players_.size(); i++) {
        weather.watch(&players_[i]->account);
    }
}

void Soak::on_tick(vkp_timer *timer)
{
    for (const auto &each : VKP_CONTAINER(timer, Tick, timer)->soak->players_) {
        each->tick();
    }
}

// Wait for it. In vain, or when something is wrong: false.
bool Soak::until(const char *what, const std::function<bool()> &condition)
{
    const uint64_t deadline = vkp_test_deadline();
    while (!condition()) {
        if (faults_.any()) {
            return false;
        }
        if (vkp_now_ns() > deadline) {
            std::string text = std::string("waited in vain for ") + what + "\n";
            for (const std::unique_ptr<Player> &each : players_) {
                text += each->account.text();
            }
            faults_.add(text);
            return false;
        }
        (void)poll(nullptr, 0, 1);
    }
    return !faults_.any();
}

bool Soak::all(const std::function<bool(Player &)> &condition)
{
    bool so = true;
    for (const std::unique_ptr<Player> &each : players_) {
        so = so && condition(*each);
    }
    return so;
}

// The time of misdeeds and faults.
void Soak::adversity(uint64_t until_ns)
{
    stage_.flips = true;
    scripted_.calm = false;
    while (vkp_now_ns() < until_ns && !faults_.any()) {
        for (const std::unique_ptr<Weather> &each : weather_) {
            each->act(vkp_now_ns());
        }
        (void)poll(nullptr, 0, 2);
    }
    stage_.flips = false;
    scripted_.calm = true;
    scripted_.ends = true;
    for (const std::unique_ptr<Weather> &each : weather_) {
        each->calm();
    }
}

// All servers behave: everything comes back, and what is published last arrives.
bool Soak::settle()
{
    const auto whole = [](Player &each) { return each.account.is_whole(); };
    if (!until("all names", [&] { return all(whole); })) {
        return false;
    }
    std::vector<uint64_t> begun;
    std::vector<const Ledger *> ledgers = {&scripted_.ledger};
    for (const std::unique_ptr<Weather> &each : weather_) {
        ledgers.push_back(&each->ledger);
    }
    for (const Ledger *each : ledgers) {
        begun.push_back(each->begun() + 100);
    }
    bool ok = until("the last messages", [&] {
        bool more = true;
        for (size_t i = 0; i < ledgers.size(); i++) {
            for (uint64_t k = 0; k < stream_count; k++) {
                const uint64_t newest = ledgers[i]->newest(k);
                more = more && newest != none && newest >= begun[i];
            }
        }
        return more;
    });
    scripted_.publishes = false;
    stage_.asks = false;
    for (const std::unique_ptr<Weather> &each : weather_) {
        each->stop();
        each->rest();
    }
    ok = ok && until("everything published", [&] {
             return all([](Player &each) {
                 return each.account.is_whole() && each.account.has_all() &&
                        each.replies.all_ended() && each.wants_nothing_back();
             });
         });
    return ok;
}

bool Soak::run(double for_seconds)
{
    scripted_.start();
    if (vkp_timer_start(&tick_.timer, loop_, on_tick, 5 * ms, vkp_loop_after_ms(loop_, 5)) !=
        VKP_OK) {
        vkp_test_fail("no timer");
    }
    thread_ = std::make_unique<vkp_test_loop_thread>(loop_);
    const auto whole = [](Player &each) { return each.account.is_whole(); };
    bool ok = until("all names at first", [&] { return all(whole); });
    for (const std::unique_ptr<Weather> &each : weather_) {
        each->rest();
    }
    live_bytes_before = vkp_test_env_live_bytes(&loop_.test);
    const int descriptors = vkp_test_fd_count();
    for (const std::unique_ptr<Weather> &each : weather_) {
        each->start();
    }
    scripted_.publishes = true;
    stage_.asks = true;
    if (ok) {
        adversity(vkp_now_ns() + static_cast<uint64_t>(for_seconds * 1e9));
    }
    ok = ok && settle();
    ok = ok && until("the descriptors of the beginning",
                     [&] { return vkp_test_fd_count() == descriptors; });
    live_bytes_after = vkp_test_env_live_bytes(&loop_.test);
    for (const std::unique_ptr<Player> &each : players_) {
        stats_.emplace_back();
        vkp_client_get_stats(each->client(), &stats_.back());
    }
    end();
    return ok;
}

void Soak::end()
{
    stage_.ends = true;
    stage_.asks = false;
    thread_.reset();
    vkp_timer_stop(&tick_.timer);
    for (const std::unique_ptr<Player> &each : players_) {
        each->end();
    }
    loop_.close();
    for (const std::unique_ptr<Weather> &each : weather_) {
        each->stop();
    }
    scripted_.stop();
}

Account::Totals Soak::totals() const
{
    Account::Totals all;
    for (const std::unique_ptr<Player> &each : players_) {
        const Account::Totals one = each->account.totals();
        all.messages += one.messages;
        all.missing += one.missing;
        all.outages += one.outages;
        all.gaps += one.gaps;
        all.refusals += one.refusals;
        all.losses += one.losses;
    }
    return all;
}

void Soak::report(uint64_t seed) const
{
    const double for_seconds = static_cast<double>(vkp_now_ns() - begun_ns_) / 1e9;
    const Account::Totals all = totals();
    uint64_t commands = 0;
    uint64_t published = scripted_.ledger.taken();
    uint64_t faults = 0;
    uint64_t repairs = 0;
    for (const std::unique_ptr<Player> &each : players_) {
        commands += each->replies.answered();
    }
    for (const std::unique_ptr<Weather> &each : weather_) {
        published += each->ledger.taken();
        faults += each->faults();
    }
    for (const vkp_client_stats &each : stats_) {
        repairs += each.repairs;
    }
    const auto number = [](uint64_t value) { return static_cast<unsigned long long>(value); };
    std::printf("soak: %llu messages of %llu published, %llu outages, %llu gaps, %llu missing, "
                "%llu refusals, %llu losses, %llu repairs, %llu commands, %llu misdeeds, "
                "%llu faults, %.2f minutes, %.0f messages/s, %.0f outages/min, seed %llu\n",
                number(all.messages), number(published), number(all.outages), number(all.gaps),
                number(all.missing), number(all.refusals), number(all.losses), number(repairs),
                number(commands), number(scripted_.misbehaved()), number(faults), for_seconds / 60,
                static_cast<double>(all.messages) / for_seconds,
                static_cast<double>(all.outages) * 60 / for_seconds, number(seed));
    std::fflush(stdout);
}

// The client's own counters say the same, and enough happened.
void Soak::check(double for_seconds) const
{
    for (size_t i = 0; i < players_.size(); i++) {
        const Account::Totals one = players_[i]->account.totals();
        INFO(players_[i]->account.who());
        CHECK(stats_[i].outages == one.outages);
        CHECK(stats_[i].connections == one.connects);
        CHECK(stats_[i].connections == one.outages + 1);
        CHECK(stats_[i].gaps == one.gaps);
        CHECK(stats_[i].losses == one.losses);
        CHECK(stats_[i].refusals >= one.refusals);
        CHECK((stats_[i].repairs > 0 || one.spare == 0));
        CHECK((one.outages > 0 || for_seconds < 60));
        CHECK(players_[i]->replies.all_ended());
    }
    // A gate only asks whether anything happened; a longer run has to be worth its time.
    const Account::Totals all = totals();
    const bool is_long = for_seconds >= 60 && !VKP_TEST_SANITIZED && !weather_.empty();
    CHECK(static_cast<double>(all.messages) >= (is_long ? 1e7 / 1200 : 50) * for_seconds);
    CHECK(static_cast<double>(all.outages) >= (is_long ? 500.0 / 1200 : 0.1) * for_seconds);
    CHECK(all.gaps > 0);
}

} // namespace

TEST_CASE("soak: the books balance, and memory and descriptors are back", "[client][server]")
{
    if (vkp_test_server_program() == nullptr) {
        WARN("neither valkey-server nor redis-server is on PATH: the scripted server alone");
    }
    const double for_seconds = seconds();
    const uint64_t chosen = seed();
    const int descriptors = vkp_test_fd_count();
    const long before_kib = resident_kib();
    INFO("VKP_TEST_SEED=" << chosen);
    {
        Soak soak(chosen); // at its end no block is left, or it aborts
        const bool ok = soak.run(for_seconds);
        soak.report(chosen);
        INFO(soak.faults());
        REQUIRE(ok);
        soak.check(for_seconds);
        std::printf("soak: %lu bytes live before, %lu after\n",
                    static_cast<unsigned long>(soak.live_bytes_before),
                    static_cast<unsigned long>(soak.live_bytes_after));
        CHECK(soak.live_bytes_after <= soak.live_bytes_before + (1 << 20));
    }
    CHECK(vkp_test_fd_count() == descriptors);
    const long after_kib = resident_kib();
    std::printf("soak: %ld KiB resident before, %ld after\n", before_kib, after_kib);
    if (!VKP_TEST_SANITIZED) {
        CHECK(after_kib < before_kib + 64 * 1024);
    }
}

} // namespace soak
