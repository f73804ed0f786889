/* What the tests of channels share: the builds of their waiting code, threads that are known to
   wait, loops with a watch, and values whose owners are counted.
   SPDX-License-Identifier: MIT                                                                  */
#ifndef VKP_TEST_CHANNEL_PROBE_H
#define VKP_TEST_CHANNEL_PROBE_H

#include "support/park_probe.h"
#include "support/support.h"

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

/* Channels wait in one of two ways, as the system has a barrier for all threads or not, and spin
   before they sleep or do not: each test of threads runs in all four.                           */
struct vkp_test_build {
    const char *name;
    bool fenced;
    uint32_t spins;
};

inline constexpr vkp_test_build vkp_test_builds[] = {
    {"membarrier", false, 0},
    {"membarrier, no spins", false, VKP_SPINS_NONE},
    {"fences", true, 0},
    {"fences, no spins", true, VKP_SPINS_NONE},
};

/* The system of such a build. A thread that polls waits as one that parks: both are counted. */
inline const vkp_sys *vkp_test_build_sys(bool fenced)
{
    static const vkp_sys with = [] {
        vkp_sys copy = *vkp_test_probed_sys();
        copy.poll = [](void *pollfds, size_t count, uint64_t deadline_ns) {
            if (vkp_test_parks != nullptr && deadline_ns != 0) {
                vkp_test_parks->fetch_add(1);
            }
            return vkp_sys_get_default()->poll(pollfds, count, deadline_ns);
        };
        return copy;
    }();
    static const vkp_sys without = [] {
        vkp_sys copy = with;
        copy.membarrier = [](bool) { return -ENOSYS; };
        return copy;
    }();
    return fenced ? &without : &with;
}

/* The C library's memory, without a lock that would hide races from a sanitizer. */
inline vkp_env vkp_test_env_of(const vkp_test_build &build)
{
    vkp_env env = VKP_ZERO;
    env.sys = vkp_test_build_sys(build.fenced);
    env.spins = build.spins;
    return env;
}

/* Memory that is counted and can be made to fail; aborts when some is left. */
class vkp_test_memory : public vkp_test_counted {
  public:
    vkp_test_memory() = default;
    explicit vkp_test_memory(const vkp_test_build &build)
        : vkp_test_counted(vkp_test_build_sys(build.fenced))
    {
        test.env.spins = build.spins;
    }
    uint64_t calls()
    {
        return vkp_test_env_calls(&test);
    }
    uint64_t failures()
    {
        return vkp_test_env_failures(&test);
    }
    void fail(vkp_test_fault kind, uint64_t k)
    {
        fault(kind, k);
    }
    void heal()
    {
        fault(VKP_TEST_FAULT_NONE, 0);
    }
};

/* Aborts a test that hangs. A wait with a deadline looks once more when that has passed, and so
   hides that nobody woke it: this deadline is before those of the waits that begin later.      */
class vkp_test_watchdog {
  public:
    vkp_test_watchdog()
        : thread_([this, deadline = vkp_test_deadline()] {
              std::unique_lock<std::mutex> lock(mutex_);
              while (!done_) {
                  const uint64_t now = vkp_now_ns();
                  if (now >= deadline) {
                      vkp_test_fail("a wait that nobody ended");
                  }
                  ended_.wait_for(lock, std::chrono::nanoseconds(deadline - now));
              }
          })
    {
    }
    ~vkp_test_watchdog()
    {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            done_ = true;
        }
        ended_.notify_one();
        thread_.join();
    }
    vkp_test_watchdog(const vkp_test_watchdog &) = delete;
    vkp_test_watchdog &operator=(const vkp_test_watchdog &) = delete;

  private:
    std::mutex mutex_;
    std::condition_variable ended_;
    bool done_ = false;
    std::thread thread_; /* last: it uses the others */
};

/* A thread whose call waits; the constructor returns when others can see that it does. */
class vkp_test_waiting {
  public:
    explicit vkp_test_waiting(std::function<vkp_status()> call)
        : thread_([this, call = std::move(call)] {
              vkp_test_parks = &parks_;
              status_ = call();
              vkp_test_parks = nullptr;
          })
    {
        vkp_test_await_park(parks_);
    }
    ~vkp_test_waiting()
    {
        if (thread_.joinable()) {
            thread_.join();
        }
    }
    vkp_status join()
    {
        thread_.join();
        return status_;
    }
    unsigned parks() const
    {
        return parks_.load();
    }

  private:
    std::atomic<unsigned> parks_{0};
    vkp_status status_ = VKP_ERR_INVALID;
    std::thread thread_;
};

/* Runs what is ready now, in a few rounds: a watch may need one to be armed again. */
inline void vkp_test_settle(vkp_loop *loop)
{
    for (int i = 0; i < 3; i++) {
        if (vkp_loop_run_once(loop, 0) != VKP_OK) {
            vkp_test_fail("a round failed");
        }
    }
}

/* A handler of a case; calls what it is given, until stop, and counts. */
class vkp_test_handler {
  public:
    vkp_test_handler(vkp_loop *loop, vkp_case what, std::function<void()> fn) : fn_(std::move(fn))
    {
        status = vkp_handler_open(loop, &what, call, this, &handler_);
    }
    ~vkp_test_handler()
    {
        stop();
    }
    vkp_test_handler(const vkp_test_handler &) = delete;
    vkp_test_handler &operator=(const vkp_test_handler &) = delete;
    void stop()
    {
        vkp_handler_unref(std::exchange(handler_, nullptr));
    }
    vkp_status status;
    int calls = 0;

  private:
    static void call(void *user)
    {
        vkp_test_handler *self = static_cast<vkp_test_handler *>(user);
        self->calls++;
        self->fn_();
    }
    std::function<void()> fn_;
    vkp_handler *handler_ = nullptr;
};

/* A loop of this thread with one watched case. */
class vkp_test_watched {
  public:
    explicit vkp_test_watched(const vkp_backend *backend, const vkp_env *env = nullptr)
    {
        vkp_loop_config config = VKP_ZERO;
        config.backend = backend;
        config.env = env;
        if (vkp_loop_open(&config, &loop_) != VKP_OK) {
            vkp_test_fail("no loop on %s", backend->name);
        }
    }
    ~vkp_test_watched()
    {
        end();
        vkp_loop_close(loop_);
        vkp_loop_unref(loop_);
    }
    vkp_test_watched(const vkp_test_watched &) = delete;
    vkp_test_watched &operator=(const vkp_test_watched &) = delete;
    vkp_loop *loop() const
    {
        return loop_;
    }
    vkp_status watch(const vkp_case &what, std::function<void()> fn)
    {
        handler_ = std::make_unique<vkp_test_handler>(loop_, what, std::move(fn));
        return handler_->status;
    }
    void end() /* also inside its own call */
    {
        if (handler_ != nullptr) {
            handler_->stop();
        }
    }
    void settle()
    {
        vkp_test_settle(loop_);
    }
    template <typename Done>
    void until(const char *what, Done done)
    {
        vkp_test_run_until(loop_, what, done);
    }

  private:
    vkp_loop *loop_ = nullptr;
    std::unique_ptr<vkp_test_handler> handler_;
};

/* Owners of values that are numbered from 0, each number in the value's first eight bytes. Give it
   to a channel as `user`; whoever gets a value that owns something calls drop itself.           */
class vkp_test_ledger {
  public:
    explicit vkp_test_ledger(size_t values) : owners_(values), drops_(values)
    {
    }
    void own(uint64_t number) /* a new value */
    {
        at(owners_, number).fetch_add(1);
    }
    static void retain(void *user, void *item)
    {
        vkp_test_ledger *self = static_cast<vkp_test_ledger *>(user);
        /* A copy is made of what is owned: nobody may own a value that nobody owned any more. */
        if (at(self->owners_, number_of(item)).fetch_add(1) <= 0) {
            self->wrong_.fetch_add(1);
        }
    }
    static void drop(void *user, void *item)
    {
        vkp_test_ledger *self = static_cast<vkp_test_ledger *>(user);
        const uint64_t number = number_of(item);
        at(self->drops_, number).fetch_add(1);
        if (at(self->owners_, number).fetch_sub(1) <= 0) {
            self->wrong_.fetch_add(1);
        }
    }
    int owners(uint64_t number)
    {
        return at(owners_, number).load();
    }
    int drops(uint64_t number)
    {
        return at(drops_, number).load();
    }
    size_t owned() /* values that somebody owns */
    {
        size_t count = 0;
        for (std::atomic<int> &each : owners_) {
            count += each.load() != 0;
        }
        return count;
    }
    size_t wrong() /* values dropped or copied after their last owner dropped them */
    {
        return wrong_.load();
    }

  private:
    static uint64_t number_of(const void *item)
    {
        uint64_t number;
        std::memcpy(&number, item, sizeof number);
        return number;
    }
    static std::atomic<int> &at(std::vector<std::atomic<int>> &counts, uint64_t number)
    {
        if (number >= counts.size()) {
            vkp_test_fail("a value that nobody made: %llu",
                          static_cast<unsigned long long>(number));
        }
        return counts[static_cast<size_t>(number)];
    }
    std::vector<std::atomic<int>> owners_;
    std::vector<std::atomic<int>> drops_;
    std::atomic<size_t> wrong_{0};
};

/* Values of any size that tell one from another: bytes made of a number. The first eight hold it
   when there is room; a value torn between two numbers matches neither.                         */
inline void vkp_test_fill(void *item, size_t bytes, uint64_t number)
{
    unsigned char *out = static_cast<unsigned char *>(item);
    for (size_t i = 0; i < bytes; i++) {
        out[i] = i < 8 ? static_cast<unsigned char>(number >> (8 * i))
                       : static_cast<unsigned char>(number * 31 + i * 7);
    }
    if (bytes >= sizeof number) { // to be read as a number again, on any processor
        std::memcpy(item, &number, sizeof number);
    }
}

inline bool vkp_test_is_filled(const void *item, size_t bytes, uint64_t number)
{
    std::vector<unsigned char> want(bytes);
    vkp_test_fill(want.data(), bytes, number);
    return std::memcmp(item, want.data(), bytes) == 0;
}

#endif /* VKP_TEST_CHANNEL_PROBE_H */
