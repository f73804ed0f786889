// SPDX-License-Identifier: MIT
//
// Text views and immutable ref-counted bytes.
#include "support/catch.hpp"

#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "support/support.h"

namespace {

std::string text_of(const vkp_bytes &bytes)
{
    return std::string(reinterpret_cast<const char *>(bytes.data), bytes.len);
}

bool is_empty(const vkp_bytes &bytes)
{
    return bytes.len == 0 && bytes.block == nullptr;
}

using Env = vkp_test_counted;

} // namespace

TEST_CASE("str: a view of a terminated text, or empty for NULL", "[bytes]")
{
    const char *text = "hello";
    const vkp_str view = vkp_str_of(text);
    CHECK(view.ptr == text);
    CHECK(view.len == 5);
    CHECK(vkp_str_of("").len == 0);
    CHECK(vkp_str_of(nullptr).len == 0);
}

TEST_CASE("str: VKP_FMT prints exactly the view", "[bytes]")
{
    vkp_str view = vkp_str_of("channel:1");
    view.len = 7;
    char out[32];
    std::snprintf(out, sizeof out, "<%.*s>", VKP_FMT(view));
    CHECK(std::string(out) == "<channel>");
}

TEST_CASE("bytes: a copy is independent of what it was copied from", "[bytes]")
{
    Env env;
    char source[] = "abc";
    vkp_bytes bytes = VKP_ZERO;
    REQUIRE(vkp_bytes_copy(&env.test.env, source, 3, &bytes) == VKP_OK);
    source[0] = 'X';
    CHECK(text_of(bytes) == "abc");
    CHECK(bytes.block != nullptr);
    CHECK(env.blocks() == 1);
    vkp_bytes_unref(&bytes);
    CHECK(is_empty(bytes));
    CHECK(env.blocks() == 0);
}

TEST_CASE("bytes: every byte value and many sizes survive a copy", "[bytes]")
{
    Env env;
    for (size_t len :
         {size_t{1}, size_t{2}, size_t{255}, size_t{256}, size_t{4096}, size_t{70000}}) {
        std::string source(len, '\0');
        for (size_t i = 0; i < len; i++) {
            source[i] = static_cast<char>(i * 31 + i / 256);
        }
        vkp_bytes bytes = VKP_ZERO;
        REQUIRE(vkp_bytes_copy(&env.test.env, source.data(), len, &bytes) == VKP_OK);
        CHECK(text_of(bytes) == source);
        vkp_bytes_unref(&bytes);
    }
    CHECK(env.blocks() == 0);
}

TEST_CASE("bytes: an empty copy is empty, with or without a pointer", "[bytes]")
{
    Env env;
    for (const char *data : {"abc", static_cast<const char *>(nullptr)}) {
        vkp_bytes bytes = VKP_ZERO;
        REQUIRE(vkp_bytes_copy(&env.test.env, data, 0, &bytes) == VKP_OK);
        CHECK(bytes.len == 0);
        vkp_bytes_unref(&bytes);
        CHECK(is_empty(bytes));
    }
    CHECK(env.blocks() == 0);
}

TEST_CASE("bytes: the default environment serves too", "[bytes]")
{
    vkp_bytes bytes = VKP_ZERO;
    REQUIRE(vkp_bytes_copy(nullptr, "xyz", 3, &bytes) == VKP_OK);
    CHECK(text_of(bytes) == "xyz");
    vkp_bytes_unref(&bytes);

    vkp_env defaults = VKP_ZERO;
    REQUIRE(vkp_bytes_copy(&defaults, "xyz", 3, &bytes) == VKP_OK);
    CHECK(text_of(bytes) == "xyz");
    vkp_bytes_unref(&bytes);
}

TEST_CASE("bytes: refused copies say why and leave the output alone", "[bytes]")
{
    Env env;
    vkp_bytes marked;
    marked.data = reinterpret_cast<const uint8_t *>("mark");
    marked.len = 4;
    marked.block = nullptr;
    vkp_bytes out = marked;
    CHECK(vkp_bytes_copy(&env.test.env, "a", 1, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_bytes_copy(&env.test.env, nullptr, 1, &out) == VKP_ERR_INVALID);
#if SIZE_MAX > UINT32_MAX
    CHECK(vkp_bytes_copy(&env.test.env, "a", size_t{UINT32_MAX} + 1, &out) == VKP_ERR_INVALID);
    CHECK(vkp_bytes_copy(&env.test.env, "a", SIZE_MAX, &out) == VKP_ERR_INVALID);
#endif
    vkp_test_env_fault(&env.test, VKP_TEST_FAULT_ONCE, 1);
    CHECK(vkp_bytes_copy(&env.test.env, "a", 1, &out) == VKP_ERR_NOMEM);
    CHECK(vkp_test_env_failures(&env.test) == 1);
    CHECK(out.data == marked.data);
    CHECK(out.len == marked.len);
    CHECK(out.block == nullptr);
    CHECK(env.blocks() == 0);
    REQUIRE(vkp_bytes_copy(&env.test.env, "a", 1, &out) == VKP_OK);
    vkp_bytes_unref(&out);
}

TEST_CASE("bytes: a copy takes one block, little larger than the bytes", "[bytes]")
{
    Env env;
    const std::string source(100000, 'x');
    vkp_bytes bytes = VKP_ZERO;
    REQUIRE(vkp_bytes_copy(&env.test.env, source.data(), source.size(), &bytes) == VKP_OK);
    CHECK(env.blocks() == 1);
    CHECK(env.bytes() >= source.size());
    CHECK(env.bytes() <= source.size() + 256);
    vkp_bytes_unref(&bytes);
}

TEST_CASE("bytes: static bytes have no block and allocate nothing", "[bytes]")
{
    static const char text[] = "literal";
    vkp_bytes bytes = vkp_bytes_static(text, 7);
    CHECK(bytes.data == reinterpret_cast<const uint8_t *>(text));
    CHECK(bytes.len == 7);
    CHECK(bytes.block == nullptr);
    vkp_bytes again = vkp_bytes_ref(&bytes);
    CHECK(again.data == bytes.data);
    CHECK(again.len == 7);
    CHECK(again.block == nullptr);
    vkp_bytes part = vkp_bytes_slice(&bytes, 3, 2);
    CHECK(text_of(part) == "er");
    CHECK(part.block == nullptr);
    vkp_bytes_unref(&bytes);
    vkp_bytes_unref(&again);
    CHECK(text_of(part) == "er");
    vkp_bytes_unref(&part);
    CHECK(is_empty(part));
}

TEST_CASE("bytes: a reference shares the bytes; the last one frees them", "[bytes]")
{
    Env env;
    vkp_bytes first = VKP_ZERO;
    REQUIRE(vkp_bytes_copy(&env.test.env, "shared", 6, &first) == VKP_OK);
    const uint64_t calls = vkp_test_env_calls(&env.test);
    vkp_bytes second = vkp_bytes_ref(&first);
    vkp_bytes third = vkp_bytes_ref(&second);
    CHECK(vkp_test_env_calls(&env.test) == calls);
    CHECK(second.data == first.data);
    CHECK(second.len == 6);
    CHECK(second.block == first.block);
    vkp_bytes_unref(&first);
    vkp_bytes_unref(&third);
    CHECK(env.blocks() == 1);
    CHECK(text_of(second) == "shared");
    vkp_bytes_unref(&second);
    CHECK(env.blocks() == 0);
}

TEST_CASE("bytes: giving a value back twice gives one reference back", "[bytes]")
{
    Env env;
    vkp_bytes bytes = VKP_ZERO;
    REQUIRE(vkp_bytes_copy(&env.test.env, "abc", 3, &bytes) == VKP_OK);
    vkp_bytes other = vkp_bytes_ref(&bytes);
    vkp_bytes_unref(&bytes);
    vkp_bytes_unref(&bytes);
    CHECK(text_of(other) == "abc");
    vkp_bytes_unref(&other);
    vkp_bytes_unref(&other);
    vkp_bytes_unref(nullptr);
    vkp_bytes empty = VKP_ZERO;
    vkp_bytes_unref(&empty);
    CHECK(is_empty(empty));
    CHECK(env.blocks() == 0);
}

TEST_CASE("bytes: a slice is clamped to what is there", "[bytes]")
{
    struct Row {
        size_t offset;
        size_t len;
        const char *expected;
    };
    const Row rows[] = {
        {0, 10, "0123456789"},
        {0, 0, ""},
        {3, 4, "3456"},
        {9, 1, "9"},
        {9, 2, "9"},
        {10, 0, ""},
        {10, 1, ""},
        {11, 1, ""},
        {0, SIZE_MAX, "0123456789"},
        {5, SIZE_MAX, "56789"},
        {SIZE_MAX, SIZE_MAX, ""},
        {SIZE_MAX, 1, ""},
    };
    Env env;
    vkp_bytes whole = VKP_ZERO;
    REQUIRE(vkp_bytes_copy(&env.test.env, "0123456789", 10, &whole) == VKP_OK);
    for (const Row &row : rows) {
        INFO(row.offset << " " << row.len);
        vkp_bytes part = vkp_bytes_slice(&whole, row.offset, row.len);
        CHECK(text_of(part) == row.expected);
        vkp_bytes_unref(&part);
        CHECK(is_empty(part));
    }
    CHECK(text_of(whole) == "0123456789");
    vkp_bytes_unref(&whole);
    CHECK(env.blocks() == 0);
}

TEST_CASE("bytes: a slice keeps the block alive, slices of slices too", "[bytes]")
{
    Env env;
    vkp_bytes whole = VKP_ZERO;
    REQUIRE(vkp_bytes_copy(&env.test.env, "0123456789", 10, &whole) == VKP_OK);
    vkp_bytes middle = vkp_bytes_slice(&whole, 2, 6);
    CHECK(middle.data == whole.data + 2);
    CHECK(middle.block == whole.block);
    vkp_bytes_unref(&whole);
    vkp_bytes inner = vkp_bytes_slice(&middle, 1, 100);
    CHECK(text_of(inner) == "34567");
    vkp_bytes_unref(&middle);
    CHECK(env.blocks() == 1);
    CHECK(text_of(inner) == "34567");
    vkp_bytes_unref(&inner);
    CHECK(env.blocks() == 0);
}

TEST_CASE("bytes: references and slices of nothing are nothing", "[bytes]")
{
    vkp_bytes empty = VKP_ZERO;
    vkp_bytes again = vkp_bytes_ref(&empty);
    CHECK(is_empty(again));
    vkp_bytes part = vkp_bytes_slice(&empty, 0, 5);
    CHECK(is_empty(part));
    vkp_bytes_unref(&again);
    vkp_bytes_unref(&part);
}

TEST_CASE("bytes: threads take and give references; the bytes are read until the last",
          "[bytes][threads]")
{
    Env env;
    for (int round = 0; round < 20; round++) {
        vkp_bytes whole = VKP_ZERO;
        const std::string source(64, static_cast<char>('a' + round));
        REQUIRE(vkp_bytes_copy(&env.test.env, source.data(), source.size(), &whole) == VKP_OK);
        const int threads = 4;
        std::vector<vkp_bytes> own(threads);
        std::vector<size_t> wrong(threads, 0);
        for (vkp_bytes &bytes : own) {
            bytes = vkp_bytes_ref(&whole);
        }
        vkp_bytes_unref(&whole);
        std::vector<std::thread> workers;
        for (size_t t = 0; t < own.size(); t++) {
            workers.emplace_back([&, t] {
                for (int i = 0; i < 2000; i++) {
                    vkp_bytes copy = vkp_bytes_ref(&own[t]);
                    vkp_bytes part = vkp_bytes_slice(&copy, 8, 16);
                    vkp_bytes_unref(&copy);
                    wrong[t] += text_of(part) != source.substr(8, 16);
                    vkp_bytes_unref(&part);
                }
                wrong[t] += text_of(own[t]) != source;
                vkp_bytes_unref(&own[t]);
            });
        }
        for (std::thread &worker : workers) {
            worker.join();
        }
        for (size_t count : wrong) {
            CHECK(count == 0);
        }
        REQUIRE(env.blocks() == 0);
    }
}
