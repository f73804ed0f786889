// SPDX-License-Identifier: MIT
//
// A value as text: each type alone and inside aggregates, what is left out, every size of the
// buffer, and trees of any depth.
#include "support/catch.hpp"

#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "support/support.h"

namespace {

class Read {
  public:
    explicit Read(const std::string &bytes, uint32_t max_depth = 0) : bytes_(bytes)
    {
        vkp_resp_config config = VKP_ZERO;
        size_t consumed = 0;
        config.max_depth = max_depth;
        if (vkp_resp_reader_open(&config, &reader_) != VKP_OK ||
            vkp_resp_reader_scan(reader_, bytes_.data(), bytes_.size(), &value_, &consumed) !=
                VKP_OK ||
            consumed != bytes_.size()) {
            vkp_test_fail("not one value: %s", bytes_.c_str());
        }
    }
    ~Read()
    {
        vkp_resp_reader_unref(reader_);
    }
    Read(const Read &) = delete;
    Read &operator=(const Read &) = delete;
    operator const vkp_value *() const
    {
        return value_;
    }

  private:
    std::string bytes_;
    vkp_resp_reader *reader_ = nullptr;
    const vkp_value *value_ = nullptr;
};

std::string text_of(const vkp_value *value)
{
    const size_t len = vkp_value_get_text(value, nullptr, 0);
    std::vector<char> buffer(len + 1, '#');
    CHECK(vkp_value_get_text(value, buffer.data(), buffer.size()) == len);
    CHECK(buffer[len] == '\0');
    return std::string(buffer.data(), len);
}

std::string text_of(const std::string &bytes)
{
    return text_of(Read(bytes));
}

struct Row {
    std::string bytes;
    std::string alone;
    std::string inside; // of an array
};

std::string quoted(vkp_str text)
{
    std::string out = "\"";
    for (size_t i = 0; i < text.len; i++) {
        const unsigned char byte = static_cast<unsigned char>(text.ptr[i]);
        char escape[8] = {static_cast<char>(byte), '\0'};
        if (byte == '"' || byte == '\\') {
            std::snprintf(escape, sizeof escape, "\\%c", byte);
        } else if (byte == '\n' || byte == '\r' || byte == '\t') {
            std::snprintf(escape, sizeof escape, "\\%c",
                          byte == '\n'   ? 'n'
                          : byte == '\r' ? 'r'
                                         : 't');
        } else if (byte < 32 || byte > 126) {
            std::snprintf(escape, sizeof escape, "\\x%02x", byte);
        }
        out += escape;
    }
    return out + "\"";
}

// The same by the walkers, with recursion.
std::string expected(const vkp_value *value, bool inside = false)
{
    const std::string str(vkp_test_view(vkp_value_get_str(value)));
    switch (static_cast<vkp_resp_type>(value->type)) {
    case VKP_RESP_NULL:
        return "null";
    case VKP_RESP_STRING:
        return inside ? quoted(vkp_value_get_str(value)) : str;
    case VKP_RESP_ERROR:
        return "(error) " + (inside ? quoted(vkp_value_get_str(value)) : str);
    case VKP_RESP_INTEGER:
        return std::to_string(value->u.integer);
    case VKP_RESP_BOOL:
        return value->u.integer != 0 ? "true" : "false";
    case VKP_RESP_DOUBLE:
    case VKP_RESP_BIGNUM:
        return str;
    case VKP_RESP_ARRAY:
    case VKP_RESP_SET:
    case VKP_RESP_PUSH:
    case VKP_RESP_MAP:
    case VKP_RESP_ATTRIBUTE:
        break;
    }
    const bool map = value->type == VKP_RESP_MAP;
    std::string out = map                            ? "{"
                      : value->type == VKP_RESP_SET  ? "~["
                      : value->type == VKP_RESP_PUSH ? ">["
                                                     : "[";
    size_t count = 0;
    for (const vkp_value *at = vkp_value_get_first(value); at != nullptr;
         at = vkp_value_get_next(value, at)) {
        out += count == 0 ? "" : map && count % 2 == 1 ? ": " : ", ";
        out += expected(at, true);
        count++;
    }
    return out + (map ? "}" : "]");
}

// A random value, with attributes and pushes inside.
std::string random_value(std::mt19937 &random, int depth)
{
    static const std::vector<std::string> scalars = {"+ok\r\n",
                                                     "$0\r\n\r\n",
                                                     "$5\r\na\"\\\n\x80\r\n",
                                                     "-ERR x\r\n",
                                                     ":-7\r\n",
                                                     ",1.5\r\n",
                                                     "#t\r\n",
                                                     "#f\r\n",
                                                     "_\r\n",
                                                     "(12345678901\r\n",
                                                     "$-1\r\n",
                                                     "*-1\r\n",
                                                     "*0\r\n",
                                                     "%0\r\n",
                                                     "~0\r\n",
                                                     "=7\r\ntxt:a\tb\r\n"};
    const unsigned kind = depth == 0 ? 0 : random() % 10;
    if (kind < 4) {
        return scalars[random() % scalars.size()];
    }
    if (kind == 4) {
        return "|1\r\n+k\r\n" + random_value(random, depth - 1) + random_value(random, depth - 1);
    }
    const unsigned count = random() % 4;
    std::string out = (kind == 5 ? "%" : kind == 6 ? "~" : "*") + std::to_string(count) + "\r\n";
    for (unsigned i = 0; i < (kind == 5 ? 2 * count : count); i++) {
        if (random() % 8 == 0) { // no element
            out += ">2\r\n+invalidate\r\n" + random_value(random, 1);
        }
        out += random_value(random, depth - 1);
    }
    return out;
}

} // namespace

TEST_CASE("value text: each type, alone and in an aggregate", "[resp][text]")
{
    const std::string binary("a\0b\r\n\xff", 6);
    const Row rows[] = {
        {"+OK\r\n", "OK", "\"OK\""},
        {"+\r\n", "", "\"\""},
        {"$5\r\nhello\r\n", "hello", "\"hello\""},
        {"$0\r\n\r\n", "", "\"\""},
        {"$6\r\n" + binary + "\r\n", binary, "\"a\\x00b\\r\\n\\xff\""},
        {"$7\r\n\"\\\t\x7f '/\r\n", "\"\\\t\x7f '/", "\"\\\"\\\\\\t\\x7f '/\""},
        {"=8\r\ntxt:a\"b \r\n", "a\"b ", "\"a\\\"b \""},
        {"-ERR no \"x\"\r\n", "(error) ERR no \"x\"", "(error) \"ERR no \\\"x\\\"\""},
        {"!5\r\nERR\r\n\r\n", "(error) ERR\r\n", "(error) \"ERR\\r\\n\""},
        {":0\r\n", "0", "0"},
        {":-42\r\n", "-42", "-42"},
        {":9223372036854775807\r\n", "9223372036854775807", "9223372036854775807"},
        {":-9223372036854775808\r\n", "-9223372036854775808", "-9223372036854775808"},
        {",3.14\r\n", "3.14", "3.14"},
        {",-1e-300\r\n", "-1e-300", "-1e-300"},
        {",inf\r\n", "inf", "inf"},
        {",nan\r\n", "nan", "nan"},
        {"#t\r\n", "true", "true"},
        {"#f\r\n", "false", "false"},
        {"(-123456789012345678901234567890\r\n", "-123456789012345678901234567890",
         "-123456789012345678901234567890"},
        {"_\r\n", "null", "null"},
        {"$-1\r\n", "null", "null"},
        {"*-1\r\n", "null", "null"},
        {"*0\r\n", "[]", "[]"},
        {"~0\r\n", "~[]", "~[]"},
        {"%0\r\n", "{}", "{}"},
        {"*2\r\n:1\r\n+a\r\n", "[1, \"a\"]", "[1, \"a\"]"},
        {"~2\r\n+a\r\n_\r\n", "~[\"a\", null]", "~[\"a\", null]"},
        {"%2\r\n+a\r\n:1\r\n:2\r\n%0\r\n", "{\"a\": 1, 2: {}}", "{\"a\": 1, 2: {}}"},
        {"%1\r\n%1\r\n+a\r\n+b\r\n*1\r\n+c\r\n", "{{\"a\": \"b\"}: [\"c\"]}",
         "{{\"a\": \"b\"}: [\"c\"]}"},
        {">2\r\n+subscribe\r\n*0\r\n", ">[\"subscribe\", []]", ">[\"subscribe\", []]"},
    };
    for (const Row &row : rows) {
        INFO(row.bytes);
        CHECK(text_of(row.bytes) == row.alone);
        CHECK(text_of("*1\r\n" + row.bytes) == "[" + row.inside + "]");
        CHECK(text_of("*2\r\n" + row.bytes + row.bytes) ==
              "[" + row.inside + ", " + row.inside + "]");
        CHECK(text_of("%2\r\n" + row.bytes + row.bytes + row.bytes + row.bytes) ==
              "{" + row.inside + ": " + row.inside + ", " + row.inside + ": " + row.inside + "}");
    }
    CHECK(vkp_value_get_text(nullptr, nullptr, 0) == 0);
    char buffer[4] = "abc";
    CHECK(vkp_value_get_text(nullptr, buffer, sizeof buffer) == 0);
    CHECK(buffer[0] == '\0');
}

TEST_CASE("value text: attributes and pushes in an aggregate are left out", "[resp][text]")
{
    CHECK(text_of("|1\r\n+ttl\r\n:3\r\n+v\r\n") == "v");
    CHECK(text_of("*2\r\n|1\r\n+k\r\n*1\r\n+x\r\n:1\r\n|1\r\n+k\r\n+v\r\n:2\r\n") == "[1, 2]");
    CHECK(text_of("%1\r\n+k\r\n>3\r\n+message\r\n+c\r\n+p\r\n:1\r\n") == "{\"k\": 1}");
    CHECK(text_of("*1\r\n>2\r\n+invalidate\r\n*1\r\n+k\r\n:1\r\n") == "[1]");
    CHECK(text_of("*1\r\n:1\r\n") == "[1]");
    // They may be printed by themselves.
    const Read read("*1\r\n|1\r\n+k\r\n~1\r\n:1\r\n>2\r\n+invalidate\r\n_\r\n:1\r\n");
    const vkp_value *root = read;
    CHECK(text_of(root) == "[1]");
    CHECK(root[1].type == VKP_RESP_ATTRIBUTE);
    CHECK(text_of(&root[1]) == "|{\"k\": ~[1]}");
    CHECK(root[5].type == VKP_RESP_PUSH);
    CHECK(text_of(&root[5]) == ">[\"invalidate\", null]");
}

TEST_CASE("value text: a part of a tree is a value too", "[resp][text]")
{
    const Read read("*2\r\n%1\r\n+a\r\n*2\r\n:1\r\n*1\r\n:2\r\n+z\r\n");
    const vkp_value *map = vkp_value_get_first(read);
    CHECK(text_of(read) == "[{\"a\": [1, [2]]}, \"z\"]");
    CHECK(text_of(map) == "{\"a\": [1, [2]]}");
    const vkp_value *array = vkp_value_get_next(map, vkp_value_get_first(map));
    CHECK(text_of(array) == "[1, [2]]");
    CHECK(text_of(vkp_value_get_next(array, vkp_value_get_first(array))) == "[2]");
    CHECK(text_of(vkp_value_get_next(read, map)) == "z"); // a string alone has no quotation marks
    const Read deep("*1\r\n*1\r\n*2\r\n*1\r\n:1\r\n:2\r\n");
    CHECK(text_of(vkp_value_get_first(vkp_value_get_first(deep))) == "[[1], 2]");
}

TEST_CASE("value text: a buffer that is too small gets the start, and its last byte is NUL",
          "[resp][text]")
{
    const Read read("*4\r\n$4\r\na\"\r\n\r\n%1\r\n+k\r\n~1\r\n:-5\r\n-ERR x\r\n*0\r\n");
    const std::string whole = "[\"a\\\"\\r\\n\", {\"k\": ~[-5]}, (error) \"ERR x\", []]";
    REQUIRE(text_of(read) == whole);
    for (size_t size = 0; size <= whole.size() + 2; size++) {
        INFO(size);
        std::vector<char> buffer(size + 4, '#');
        CHECK(vkp_value_get_text(read, buffer.data(), size) == whole.size());
        CHECK(std::string(buffer.data() + size, 4) == "####");
        if (size > 0) {
            const size_t len = std::min(size - 1, whole.size());
            CHECK(std::string(buffer.data()) == whole.substr(0, len));
        }
    }
}

TEST_CASE("value text: trees of any depth", "[resp][text]")
{
    for (size_t depth : {1u, 3u, 4u, 5u, 127u, 128u, 60000u, 65000u}) {
        INFO(depth);
        std::string bytes;
        std::string front;
        std::string back;
        for (size_t i = 0; i < depth; i++) {
            switch (i % 3) {
            case 0: // with an element behind the next level
                bytes += "*2\r\n";
                front += "[";
                back += i + 1 < depth ? "]9 ," : "]9 ,1";
                break;
            case 1: // the next level is the value of a key, and another key follows
                bytes += "%2\r\n+k\r\n";
                front += "{\"k\": ";
                back += "}6 :5 ,";
                break;
            default: // the next level is a key
                bytes += "%1\r\n";
                front += "{";
                back += "}7 :";
                break;
            }
        }
        bytes += ":1\r\n";
        for (size_t i = depth; i-- > 0;) {
            bytes += i % 3 == 0 ? ":9\r\n" : i % 3 == 1 ? ":5\r\n:6\r\n" : ":7\r\n";
        }
        const bool array = (depth - 1) % 3 == 0;
        std::string whole = front + (array ? "" : "1") + std::string(back.rbegin(), back.rend());
        const Read read(bytes, 65000);
        CHECK((text_of(read) == whole));
    }
}

TEST_CASE("value text: many elements behind deep ones take linear time", "[resp][text]")
{
    // Each level has its successor first, and then an element: 60,000 closing brackets, each in
    // the midst. A search for what ends there would take hours.
    const size_t depth = 60000;
    std::string bytes;
    for (size_t i = 0; i < depth; i++) {
        bytes += "*3\r\n:1\r\n";
    }
    bytes += ":0\r\n";
    for (size_t i = 0; i < depth; i++) {
        bytes += ":2\r\n";
    }
    const Read read(bytes, 65000);
    const std::string text = text_of(read);
    CHECK(text.size() == depth * 8 + 1);
    CHECK(text.substr(depth * 4 - 4, 13) == "[1, 0, 2], 2]");
}

TEST_CASE("value text: random trees are as the walkers have them", "[resp][text]")
{
    std::mt19937 random(5);
    for (int round = 0; round < 5000; round++) {
        const std::string bytes = random_value(random, 6);
        const Read read(bytes);
        const std::string text = text_of(read);
        if (text != expected(read)) {
            INFO(bytes);
            CHECK(text == expected(read));
        }
    }
}
