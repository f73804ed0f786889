// SPDX-License-Identifier: MIT
//
// The clients of a soak, each with its account: with a callback, with a channel of pushes, without
// an event loop of its own. They subscribe, leave and come back, and ask numbered commands.
#ifndef VKP_TEST_SOAK_PLAYERS_H
#define VKP_TEST_SOAK_PLAYERS_H

#include "soak/account.h"
#include "support/client_probe.h"

#include <atomic>
#include <memory>
#include <thread>

namespace soak {

struct Subscription {
    vkp_sub_kind kind;
    const char *name;
};

// What all players of a soak share.
struct Stage {
    vkp_loop *loop;
    const vkp_env *env;
    Faults &faults;
    std::atomic<bool> flips{false}; // names are left now and then
    std::atomic<bool> asks{false};  // commands are asked
    std::atomic<bool> ends{false};  // threads end
};

struct Role {
    std::string who;
    const Ledger &ledger;
    vkp_client_config config;
    std::vector<Subscription> names;
    bool asks;
    bool scripted; // each error of the server repeats the command's argument
};

// The replies to numbered commands, each of which repeats its argument.
class Replies {
  public:
    Replies(const Role &role, Account &account)
        : prefix_(role.who + " "), scripted_(role.scripted), account_(account)
    {
    }
    std::string next()
    {
        asked_++;
        return prefix_ + std::to_string(asked_.load());
    }
    // No command was sent after all.
    void unsent()
    {
        asked_--;
    }
    void failed(const std::string &asked, vkp_status status)
    {
        if (status != VKP_ERR_DISCONNECTED && status != VKP_ERR_CLOSED &&
            status != VKP_ERR_REFUSED && status != VKP_ERR_TIMEOUT) {
            account_.wrong(asked + " ended: " + vkp_status_str(status));
        }
        ended_++;
    }
    void answered(const std::string &asked, const vkp_value *value)
    {
        const std::string text(vkp_test_view(vkp_value_get_str(value)));
        bool fits = value->type == VKP_RESP_STRING && text == asked;
        if (value->type == VKP_RESP_ERROR) {
            fits = scripted_
                       ? text.size() > asked.size() &&
                             text.compare(text.size() - asked.size(), asked.size(), asked) == 0
                       : text.compare(0, 5, "BUSY ") == 0 || text.compare(0, 8, "LOADING ") == 0;
        }
        if (!fits) {
            account_.wrong(asked + " was answered: " + vkp_test_show(value));
        }
        ended_++;
        answered_++;
    }
    uint64_t answered() const
    {
        return answered_;
    }
    bool all_ended() const
    {
        return ended_ == asked_;
    }

  private:
    const std::string prefix_;
    const bool scripted_;
    Account &account_;
    std::atomic<uint64_t> asked_{0};
    std::atomic<uint64_t> ended_{0};
    std::atomic<uint64_t> answered_{0};
};

class Player {
  public:
    Player(Stage &stage, const Role &role)
        : account(role.who, role.ledger, stage.faults), replies(role, account), stage_(stage),
          asks_(role.asks)
    {
        for (const Subscription &each : role.names) {
            account.add(each.kind, each.name);
        }
    }
    virtual ~Player() = default;
    Player(const Player &) = delete;
    Player &operator=(const Player &) = delete;
    virtual const vkp_client *client() const = 0;
    virtual void end() = 0; // the client is closed, its thread has ended
    virtual void tick()     // on the loop's thread
    {
    }
    bool wants_nothing_back() const
    {
        return wants_ == 0;
    }

    Account account;
    Replies replies;

  protected:
    // Subscribe, with a notice of the outcome.
    void want(vkp_client *client, size_t at)
    {
        auto *want = new Want{this, at, account.want(at)};
        wants_++;
        const vkp_status status =
            vkp_client_subscribe_then(client, account.kind(at), account.text(at), on_outcome, want);
        if (status != VKP_OK) {
            account.wrong(std::string("subscribe: ") + vkp_status_str(status));
            on_outcome(want, status, {});
        }
    }
    void want_all(vkp_client *client)
    {
        for (size_t i = 0; i < account.count(); i++) {
            want(client, i);
        }
    }
    Stage &stage_;
    const bool asks_;

  private:
    struct Want {
        Player *player;
        size_t at;
        uint64_t generation;
    };
    static void on_outcome(void *user, vkp_status status, vkp_str words)
    {
        std::unique_ptr<Want> want(static_cast<Want *>(user));
        (void)words;
        want->player->account.outcome(want->at, want->generation, status);
        want->player->wants_--;
    }
    std::atomic<int> wants_{0};
};

// ---------------------------------------------------------------------------------------------

// With a callback; all of it on the loop's thread.
class Caller : public Player {
  public:
    Caller(Stage &stage, Role role, uint64_t seed) : Player(stage, role), random_(seed)
    {
        role.config.on_push = [](void *user, const vkp_push *push) {
            auto *self = static_cast<Caller *>(user);
            self->account.on_push(*push, vkp_loop_get_now_ns(self->stage_.loop));
        };
        role.config.user = this;
        if (vkp_client_open(stage.loop, &role.config, &client_) != VKP_OK) {
            vkp_test_fail("no client %s", role.who.c_str());
        }
        want_all(client_);
    }
    ~Caller() override
    {
        end();
    }
    const vkp_client *client() const override
    {
        return client_;
    }
    void end() override
    {
        vkp_client_unref(std::exchange(client_, nullptr));
    }
    void tick() override
    {
        flip();
        for (Ask &each : asked_) {
            if (asks_ && stage_.asks && !each.player && random_.one_in(4)) {
                ask(each);
            }
        }
    }

  private:
    struct Ask {
        Caller *player = nullptr; // null: free
        std::string text;
    };
    // Now and then a name is left. Half of them come back at once.
    void flip()
    {
        for (size_t i = 0; i < account.count(); i++) {
            if (!account.is_wanted(i)) {
                if (!stage_.flips || random_.one_in(20)) {
                    want(client_, i);
                }
            } else if (stage_.flips && random_.one_in(1000)) {
                account.leave(i);
                if (vkp_client_unsubscribe(client_, account.kind(i), account.text(i)) != VKP_OK) {
                    account.wrong("unsubscribe failed");
                }
                if (random_.one_in(2)) {
                    want(client_, i);
                }
            }
        }
    }
    void ask(Ask &with)
    {
        vkp_bytes bytes;
        with.text = replies.next();
        const std::string text = vkp_test_wire({"ECHO", with.text});
        if (vkp_bytes_copy(stage_.env, text.data(), text.size(), &bytes) != VKP_OK) {
            vkp_test_fail("no memory");
        }
        with.player = this;
        const vkp_status status = vkp_client_send(client_, &bytes, 1, on_reply, &with);
        vkp_bytes_unref(&bytes);
        if (status != VKP_OK) {
            with.player = nullptr;
            replies.unsent();
            if (status != VKP_ERR_DISCONNECTED) {
                account.wrong(std::string("a command: ") + vkp_status_str(status));
            }
        }
    }
    static void on_reply(void *user, vkp_status status, const vkp_value *value,
                         const vkp_bytes *frame)
    {
        auto *with = static_cast<Ask *>(user);
        Caller *self = std::exchange(with->player, nullptr);
        (void)frame;
        if (self == nullptr) {
            vkp_test_fail("a second reply to %s", with->text.c_str());
        }
        if (status == VKP_OK) {
            self->replies.answered(with->text, value);
        } else {
            self->replies.failed(with->text, status);
        }
    }
    Random random_;
    vkp_client *client_ = nullptr;
    Ask asked_[16];
};

// ---------------------------------------------------------------------------------------------

// With a channel of pushes, which a thread receives. That thread asks commands, too.
class Receiver : public Player {
  public:
    Receiver(Stage &stage, Role role) : Player(stage, role)
    {
        vkp_mpsc_config config = {};
        vkp_mpsc_tx *tx = nullptr;
        config.elem_bytes = sizeof(vkp_push);
        config.capacity_bytes = size_t{256} << 20; // never full
        config.cost = vkp_push_get_cost;
        config.drop = vkp_push_drop;
        config.env = stage.env;
        if (vkp_mpsc_open(&config, &tx, &rx_) != VKP_OK) {
            vkp_test_fail("no channel");
        }
        role.config.pushes = tx;
        if (vkp_client_open(stage.loop, &role.config, &client_) != VKP_OK) {
            vkp_test_fail("no client %s", role.who.c_str());
        }
        vkp_mpsc_tx_unref(tx);
        want_all(client_);
        thread_ = std::thread([this] { run(); });
    }
    ~Receiver() override
    {
        end();
    }
    const vkp_client *client() const override
    {
        return client_;
    }
    void end() override
    {
        vkp_client_unref(std::exchange(client_, nullptr)); // the channel ends
        if (thread_.joinable()) {
            thread_.join();
        }
        vkp_mpsc_rx_unref(std::exchange(rx_, nullptr));
    }

  private:
    void run()
    {
        vkp_push push;
        vkp_status status;
        while ((status = vkp_mpsc_recv(rx_, vkp_after_ms(5), &push)) != VKP_ERR_CLOSED) {
            if (status == VKP_OK) {
                account.on_push(push, none);
                vkp_push_unref(&push);
            }
            ask();
        }
        ask();
    }
    // One command is under way.
    void ask()
    {
        vkp_reply *reply = nullptr;
        if (asked_.empty()) {
            if (!asks_ || !stage_.asks) {
                return;
            }
            const std::string text = replies.next();
            if (vkp_client_command(client_, &slot_, "ECHO", text.c_str(), nullptr) == VKP_OK) {
                asked_ = text;
            } else {
                replies.unsent();
            }
            return;
        }
        const vkp_status status = vkp_oneshot_try_recv(&slot_, &reply);
        if (status == VKP_ERR_EMPTY) {
            return;
        }
        if (status == VKP_OK) {
            replies.answered(asked_, vkp_reply_get_value(reply));
            vkp_reply_unref(reply);
        } else {
            replies.failed(asked_, status);
        }
        asked_.clear();
    }
    vkp_mpsc_rx *rx_ = nullptr;
    vkp_client *client_ = nullptr;
    vkp_oneshot slot_;
    std::string asked_; // in the slot; "": nothing
    std::thread thread_;
};

// ---------------------------------------------------------------------------------------------

// vkp_sync, in a thread of its own.
class Waiter : public Player {
  public:
    Waiter(Stage &stage, Role role) : Player(stage, role)
    {
        vkp_sync_config config = {};
        config.backend = *vkp_test_backends();
        config.client = role.config;
        config.client.env = stage.env;
        config.push_bytes = size_t{256} << 20;
        if (vkp_sync_open(&config, &sync_) != VKP_OK) {
            vkp_test_fail("no client %s", role.who.c_str());
        }
        thread_ = std::thread([this] { run(); });
    }
    ~Waiter() override
    {
        end();
    }
    const vkp_client *client() const override
    {
        return vkp_sync_get_client(sync_);
    }
    void end() override
    {
        if (thread_.joinable()) {
            thread_.join();
        }
        vkp_sync_unref(std::exchange(sync_, nullptr));
    }

  private:
    void run()
    {
        uint64_t rounds = 0;
        want_all(vkp_sync_get_client(sync_));
        while (!stage_.ends) {
            vkp_push push;
            if (vkp_sync_next_push(sync_, vkp_after_ms(5), &push) == VKP_OK) {
                account.on_push(push, none);
                vkp_push_unref(&push);
            }
            if (stage_.asks && ++rounds % 16 == 0) {
                ask();
            }
        }
    }
    void ask()
    {
        vkp_reply *reply = nullptr;
        const std::string text = replies.next();
        const vkp_status status =
            vkp_sync_command(sync_, vkp_after_ms(10000), &reply, "ECHO", text.c_str(), nullptr);
        if (status == VKP_OK) {
            replies.answered(text, vkp_reply_get_value(reply));
            vkp_reply_unref(reply);
        } else {
            replies.failed(text, status);
        }
    }
    vkp_sync *sync_ = nullptr;
    std::thread thread_;
};

} // namespace soak

#endif // VKP_TEST_SOAK_PLAYERS_H
