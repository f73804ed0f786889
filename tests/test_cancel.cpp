// SPDX-License-Identifier: MIT
//
// Cancellation tokens: trees of them, of every shape, and waits on them from threads.
#include "support/catch.hpp"

#include <atomic>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <pthread.h>

#include "support/park_probe.h"
#include "support/support.h"

namespace {

using Env = vkp_test_counted;

// One reference to a token.
class Token {
  public:
    explicit Token(const vkp_env *env, vkp_cancel *parent = nullptr)
    {
        if (vkp_cancel_open(env, parent, &token_) != VKP_OK) {
            vkp_test_fail("a token was refused");
        }
    }
    ~Token()
    {
        vkp_cancel_unref(token_);
    }
    Token(const Token &) = delete;
    Token &operator=(const Token &) = delete;
    vkp_cancel *get() const
    {
        return token_;
    }
    bool triggered() const
    {
        return vkp_cancel_is_triggered(token_);
    }

  private:
    vkp_cancel *token_ = nullptr;
};

// Runs the function on a stack so small that recursion over a deep tree would leave it.
template <typename Function>
void on_small_stack(Function function)
{
    pthread_attr_t attributes;
    pthread_t thread;
    bool started = pthread_attr_init(&attributes) == 0;
    started = started && pthread_attr_setstacksize(&attributes, 512 * 1024) == 0;
    started = started && pthread_create(
                             &thread, &attributes,
                             [](void *user) -> void * {
                                 (*static_cast<Function *>(user))();
                                 return nullptr;
                             },
                             &function) == 0;
    if (!started || pthread_join(thread, nullptr) != 0) {
        vkp_test_fail("no thread with a small stack");
    }
    (void)pthread_attr_destroy(&attributes);
}

} // namespace

TEST_CASE("cancel: a token is cancelled once triggered, and stays so", "[cancel]")
{
    Env env;
    {
        Token token(&env.test.env);
        CHECK_FALSE(token.triggered());
        CHECK(vkp_cancel_wait(token.get(), 0) == VKP_ERR_TIMEOUT);
        vkp_cancel_trigger(token.get());
        CHECK(token.triggered());
        vkp_cancel_trigger(token.get());
        CHECK(token.triggered());
        CHECK(vkp_cancel_wait(token.get(), 0) == VKP_OK);
        CHECK(vkp_cancel_wait(token.get(), VKP_FOREVER) == VKP_OK);
    }
    CHECK(env.blocks() == 0);
}

TEST_CASE("cancel: refused calls say why and give nothing", "[cancel]")
{
    Env env;
    CHECK(vkp_cancel_open(&env.test.env, nullptr, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_cancel_wait(nullptr, 0) == VKP_ERR_INVALID);
    vkp_cancel_unref(nullptr);
    CHECK(env.blocks() == 0);
}

TEST_CASE("cancel: memory may fail at every allocation of an open", "[cancel][faults]")
{
    Env env;
    Token parent(&env.test.env);
    const size_t blocks = env.blocks();
    for (bool child : {false, true}) {
        const uint64_t calls = vkp_test_env_calls(&env.test);
        {
            Token token(&env.test.env, child ? parent.get() : nullptr);
        }
        const uint64_t needed = vkp_test_env_calls(&env.test) - calls;
        REQUIRE(needed > 0);
        for (uint64_t k = 1; k <= needed; k++) {
            INFO("child " << child << " k " << k);
            vkp_cancel *token = nullptr;
            vkp_test_env_fault(&env.test, VKP_TEST_FAULT_ONCE, k);
            CHECK(vkp_cancel_open(&env.test.env, child ? parent.get() : nullptr, &token) ==
                  VKP_ERR_NOMEM);
            CHECK(token == nullptr);
            CHECK(env.blocks() == blocks);
        }
        vkp_test_env_fault(&env.test, VKP_TEST_FAULT_NONE, 0);
    }
    // The parent is whole still: it cancels a child opened now.
    Token child(&env.test.env, parent.get());
    vkp_cancel_trigger(parent.get());
    CHECK(child.triggered());
}

TEST_CASE("cancel: triggering needs no memory", "[cancel][faults]")
{
    Env env;
    Token parent(&env.test.env);
    Token child(&env.test.env, parent.get());
    vkp_test_env_fault(&env.test, VKP_TEST_FAULT_FROM, 1);
    vkp_cancel_trigger(parent.get());
    CHECK(child.triggered());
    CHECK(vkp_cancel_wait(child.get(), VKP_FOREVER) == VKP_OK);
    CHECK(vkp_test_env_failures(&env.test) == 0);
    vkp_test_env_fault(&env.test, VKP_TEST_FAULT_NONE, 0);
}

TEST_CASE("cancel: descendants go with a token; ancestors and siblings do not", "[cancel]")
{
    Token root(nullptr);
    Token left(nullptr, root.get());
    Token right(nullptr, root.get());
    Token left_leaf(nullptr, left.get());
    Token left_leaf_leaf(nullptr, left_leaf.get());
    Token right_leaf(nullptr, right.get());
    vkp_cancel_trigger(left.get());
    CHECK(left.triggered());
    CHECK(left_leaf.triggered());
    CHECK(left_leaf_leaf.triggered());
    CHECK_FALSE(root.triggered());
    CHECK_FALSE(right.triggered());
    CHECK_FALSE(right_leaf.triggered());
    vkp_cancel_trigger(right_leaf.get());
    CHECK(right_leaf.triggered());
    CHECK_FALSE(right.triggered());
    CHECK_FALSE(root.triggered());
    vkp_cancel_trigger(root.get());
    CHECK(root.triggered());
    CHECK(right.triggered());
}

TEST_CASE("cancel: a child of a cancelled token is cancelled at once", "[cancel]")
{
    Token root(nullptr);
    Token before(nullptr, root.get());
    vkp_cancel_trigger(root.get());
    Token child(nullptr, root.get());
    CHECK(child.triggered());
    CHECK(vkp_cancel_wait(child.get(), 0) == VKP_OK);
    Token grandchild(nullptr, before.get());
    CHECK(grandchild.triggered());
}

TEST_CASE("cancel: unref does not cancel, and a child keeps its parent", "[cancel]")
{
    Env env;
    vkp_cancel *root = nullptr;
    vkp_cancel *middle = nullptr;
    vkp_cancel *leaf = nullptr;
    REQUIRE(vkp_cancel_open(&env.test.env, nullptr, &root) == VKP_OK);
    REQUIRE(vkp_cancel_open(&env.test.env, root, &middle) == VKP_OK);
    REQUIRE(vkp_cancel_open(&env.test.env, middle, &leaf) == VKP_OK);
    // The middle one is held by the leaf alone; cancelling still passes through it.
    vkp_cancel_unref(middle);
    CHECK_FALSE(vkp_cancel_is_triggered(leaf));
    SECTION("cancelled from above")
    {
        vkp_cancel_trigger(root);
        CHECK(vkp_cancel_is_triggered(leaf));
        vkp_cancel_unref(leaf);
        vkp_cancel_unref(root);
    }
    SECTION("the root is unref'd first")
    {
        vkp_cancel_unref(root);
        CHECK_FALSE(vkp_cancel_is_triggered(leaf));
        vkp_cancel_trigger(leaf);
        CHECK(vkp_cancel_is_triggered(leaf));
        vkp_cancel_unref(leaf);
    }
    SECTION("the leaf is unref'd first")
    {
        vkp_cancel_unref(leaf);
        CHECK_FALSE(vkp_cancel_is_triggered(root));
        vkp_cancel_trigger(root);
        vkp_cancel_unref(root);
    }
    CHECK(env.blocks() == 0);
}

TEST_CASE("cancel: references are counted", "[cancel]")
{
    Env env;
    vkp_cancel *token = nullptr;
    REQUIRE(vkp_cancel_open(&env.test.env, nullptr, &token) == VKP_OK);
    const size_t blocks = env.blocks();
    CHECK(vkp_cancel_ref(token) == token);
    vkp_cancel_unref(token);
    CHECK(env.blocks() == blocks);
    CHECK_FALSE(vkp_cancel_is_triggered(token));
    vkp_cancel_unref(token);
    CHECK(env.blocks() == 0);
}

TEST_CASE("cancel: a child that went away is not missed", "[cancel]")
{
    Env env;
    {
        Token root(&env.test.env);
        const size_t blocks = env.blocks();
        std::vector<std::unique_ptr<Token>> children;
        for (int i = 0; i < 7; i++) {
            children.push_back(std::make_unique<Token>(&env.test.env, root.get()));
        }
        // The first, one in the middle, and the last of the parent's list, whatever its order.
        children[0].reset();
        children[3].reset();
        children[6].reset();
        vkp_cancel_trigger(root.get());
        for (int i : {1, 2, 4, 5}) {
            CHECK(children[static_cast<size_t>(i)]->triggered());
        }
        children.clear();
        CHECK(env.blocks() == blocks);
    }
    CHECK(env.blocks() == 0);
}

TEST_CASE("cancel: random trees answer as a model does", "[cancel]")
{
    Env env;
    for (unsigned seed = 0; seed < 30; seed++) {
        INFO("seed " << seed);
        std::mt19937 random(seed);
        struct Node {
            vkp_cancel *token; // nullptr once unref'd
            size_t parent;     // own index: none
            bool triggered;
        };
        std::vector<Node> nodes;
        size_t wrong = 0;
        for (int step = 0; step < 400; step++) {
            const size_t pick = nodes.empty() ? 0 : random() % nodes.size();
            const unsigned long dice = random() % 20;
            const bool usable = !nodes.empty() && nodes[pick].token != nullptr;
            if (dice < 12) {
                Node node = {nullptr, nodes.size(), false};
                if (usable) {
                    node.parent = pick;
                    node.triggered = nodes[pick].triggered;
                }
                REQUIRE(vkp_cancel_open(&env.test.env, usable ? nodes[pick].token : nullptr,
                                        &node.token) == VKP_OK);
                nodes.push_back(node);
            } else if (dice < 18 && usable) {
                vkp_cancel_unref(nodes[pick].token);
                nodes[pick].token = nullptr;
            } else if (usable) {
                vkp_cancel_trigger(nodes[pick].token);
                nodes[pick].triggered = true;
                // Parents come before their children in the list.
                for (size_t i = 0; i < nodes.size(); i++) {
                    nodes[i].triggered = nodes[i].triggered || nodes[nodes[i].parent].triggered;
                }
            }
            for (const Node &node : nodes) {
                wrong +=
                    node.token != nullptr && vkp_cancel_is_triggered(node.token) != node.triggered;
            }
            REQUIRE(wrong == 0);
        }
        for (const Node &node : nodes) {
            vkp_cancel_unref(node.token);
        }
        REQUIRE(env.blocks() == 0);
    }
}

TEST_CASE("cancel: a chain of 100,000 is cancelled and freed without recursion", "[cancel]")
{
    const size_t depth = 100000;
    for (bool leaf_last : {true, false}) {
        size_t triggered = 0;
        size_t early = 0;
        on_small_stack([&] {
            std::vector<vkp_cancel *> chain(depth, nullptr);
            for (size_t i = 0; i < depth; i++) {
                if (vkp_cancel_open(nullptr, i ? chain[i - 1] : nullptr, &chain[i]) != VKP_OK) {
                    vkp_test_fail("a token was refused");
                }
            }
            vkp_cancel_trigger(chain[depth / 2]);
            early += vkp_cancel_is_triggered(chain[depth / 2 - 1]);
            vkp_cancel_trigger(chain[0]);
            for (vkp_cancel *token : chain) {
                triggered += vkp_cancel_is_triggered(token);
            }
            // Leaf last: its unref alone takes the whole chain with it.
            for (size_t i = 0; i < depth; i++) {
                vkp_cancel_unref(chain[leaf_last ? i : depth - 1 - i]);
            }
        });
        CHECK(early == 0);
        CHECK(triggered == depth);
    }
}

TEST_CASE("cancel: 100,000 children of one token", "[cancel]")
{
    const size_t width = 100000;
    Env env;
    {
        Token root(&env.test.env);
        std::vector<std::unique_ptr<Token>> children;
        for (size_t i = 0; i < width; i++) {
            children.push_back(std::make_unique<Token>(&env.test.env, root.get()));
        }
        vkp_cancel_trigger(root.get());
        size_t triggered = 0;
        for (const std::unique_ptr<Token> &child : children) {
            triggered += child->triggered();
        }
        CHECK(triggered == width);
    }
    CHECK(env.blocks() == 0);
}

TEST_CASE("cancel: a wait ends at its deadline, by the clock of the environment", "[cancel]")
{
    vkp_env env = VKP_ZERO;
    env.sys = vkp_test_virtual_sys();
    Token token(&env);
    const uint64_t deadline = vkp_test_virtual_ns.load() + uint64_t{3600} * 1000000000u;
    CHECK(vkp_cancel_wait(token.get(), deadline) == VKP_ERR_TIMEOUT);
    CHECK(vkp_test_virtual_ns.load() == deadline);
    CHECK_FALSE(token.triggered());
}

TEST_CASE("cancel: a wait on the real clock never ends before its deadline", "[cancel]")
{
    Token token(nullptr);
    const uint64_t deadline = vkp_after_ms(2);
    CHECK(vkp_cancel_wait(token.get(), deadline) == VKP_ERR_TIMEOUT);
    CHECK(vkp_now_ns() >= deadline);
}

TEST_CASE("cancel: one trigger ends all waits on a token and below it", "[cancel][threads]")
{
    vkp_env env = VKP_ZERO;
    env.sys = vkp_test_probed_sys();
    for (int round = 0; round < 30; round++) {
        Token root(&env);
        Token child(&env, root.get());
        Token leaf(&env, child.get());
        vkp_cancel *const tokens[] = {root.get(), child.get(), leaf.get(), leaf.get()};
        std::vector<vkp_status> statuses(4, VKP_ERR_INVALID);
        std::vector<std::atomic<unsigned>> parks(4);
        std::vector<std::thread> threads;
        for (size_t t = 0; t < 4; t++) {
            threads.emplace_back([&, t] {
                vkp_test_parks = &parks[t];
                statuses[t] = vkp_cancel_wait(tokens[t], vkp_test_deadline());
                vkp_test_parks = nullptr;
            });
        }
        for (const std::atomic<unsigned> &each : parks) {
            vkp_test_await_park(each);
        }
        vkp_cancel_trigger(root.get());
        for (std::thread &thread : threads) {
            thread.join();
        }
        REQUIRE(statuses == std::vector<vkp_status>(4, VKP_OK));
    }
}

TEST_CASE("cancel: cancelling a child does not end a wait on its parent", "[cancel][threads]")
{
    vkp_env env = VKP_ZERO;
    env.sys = vkp_test_probed_sys();
    Token root(&env);
    Token child(&env, root.get());
    std::atomic<unsigned> parks{0};
    std::atomic<bool> cancelled{false};
    bool early = false;
    vkp_status status = VKP_ERR_INVALID;
    std::thread waiter([&] {
        vkp_test_parks = &parks;
        status = vkp_cancel_wait(root.get(), vkp_test_deadline());
        early = !cancelled.load();
        vkp_test_parks = nullptr;
    });
    vkp_test_await_park(parks);
    vkp_cancel_trigger(child.get());
    const bool root_triggered = root.triggered();
    cancelled.store(true);
    vkp_cancel_trigger(root.get());
    waiter.join();
    CHECK_FALSE(root_triggered);
    CHECK_FALSE(early);
    CHECK(status == VKP_OK);
}

TEST_CASE("cancel: threads: a waiter may free its token as soon as its wait ends",
          "[cancel][threads]")
{
    for (int round = 0; round < 2000; round++) {
        vkp_cancel *token = nullptr;
        REQUIRE(vkp_cancel_open(nullptr, nullptr, &token) == VKP_OK);
        vkp_cancel *other = vkp_cancel_ref(token);
        vkp_status status = VKP_ERR_INVALID;
        std::thread waiter([&status, other] {
            status = vkp_cancel_wait(other, VKP_FOREVER);
            vkp_cancel_unref(other);
        });
        vkp_cancel_trigger(token);
        vkp_cancel_unref(token);
        waiter.join();
        REQUIRE(status == VKP_OK);
    }
}

TEST_CASE("cancel: threads: waits whose deadline meets the trigger", "[cancel][threads]")
{
    uint64_t strange = 0;
    for (unsigned round = 0; round < 1500; round++) {
        Token token(nullptr);
        std::vector<vkp_status> statuses(2, VKP_ERR_INVALID);
        std::vector<std::thread> threads;
        for (size_t t = 0; t < 2; t++) {
            threads.emplace_back([&, t] {
                statuses[t] = vkp_cancel_wait(token.get(), vkp_now_ns() + round % 50 * 1000);
            });
        }
        vkp_cancel_trigger(token.get());
        for (std::thread &thread : threads) {
            thread.join();
        }
        for (vkp_status status : statuses) {
            strange += status != VKP_OK && status != VKP_ERR_TIMEOUT;
        }
        strange += vkp_cancel_wait(token.get(), 0) != VKP_OK;
    }
    CHECK(strange == 0);
}

TEST_CASE("cancel: threads: children come and go while their parent is cancelled",
          "[cancel][threads]")
{
    for (int round = 0; round < 100; round++) {
        Token root(nullptr);
        const size_t threads = 3;
        std::vector<uint64_t> wrong(threads, 0);
        std::vector<std::thread> workers;
        std::atomic<size_t> started{0};
        for (size_t t = 0; t < threads; t++) {
            workers.emplace_back([&, t] {
                started.fetch_add(1);
                std::vector<vkp_cancel *> kept;
                for (int i = 0; i < 200; i++) {
                    vkp_cancel *child = nullptr;
                    vkp_cancel *parent = kept.empty() || i % 3 == 0 ? root.get() : kept.back();
                    if (vkp_cancel_open(nullptr, parent, &child) != VKP_OK) {
                        wrong[t]++;
                        continue;
                    }
                    if (i % 2) {
                        kept.push_back(child);
                    } else {
                        vkp_cancel_unref(child);
                    }
                }
                // Whether opened before or after the trigger: cancelled once it has returned.
                for (vkp_cancel *child : kept) {
                    wrong[t] += vkp_cancel_wait(child, VKP_FOREVER) != VKP_OK;
                }
                for (vkp_cancel *child : kept) {
                    vkp_cancel_unref(child);
                }
            });
        }
        while (started.load() < threads) {
            sched_yield();
        }
        vkp_cancel_trigger(root.get());
        for (std::thread &worker : workers) {
            worker.join();
        }
        REQUIRE(wrong == std::vector<uint64_t>(threads, 0));
    }
}

TEST_CASE("cancel: threads: many trigger at once", "[cancel][threads]")
{
    for (int round = 0; round < 200; round++) {
        Token root(nullptr);
        Token child(nullptr, root.get());
        Token leaf(nullptr, child.get());
        std::vector<std::thread> workers;
        std::vector<int> seen(3, 0);
        vkp_cancel *const tokens[] = {root.get(), child.get(), leaf.get()};
        for (size_t t = 0; t < 3; t++) {
            workers.emplace_back([&, t] {
                vkp_cancel_trigger(tokens[t]);
                seen[t] = vkp_cancel_is_triggered(tokens[t]) &&
                          vkp_cancel_wait(leaf.get(), VKP_FOREVER) == VKP_OK;
            });
        }
        for (std::thread &worker : workers) {
            worker.join();
        }
        REQUIRE(seen == std::vector<int>(3, 1));
        REQUIRE(root.triggered());
    }
}
