// SPDX-License-Identifier: MIT
//
// The RESP writer: each put on its own, whole values in RESP3 and for a RESP2 client, and errors,
// which are kept until take.
#include "support/catch.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "support/support.h"

namespace {

using Env = vkp_test_counted;

class Writer {
  public:
    explicit Writer(const vkp_env *env = nullptr)
    {
        vkp_resp_writer_init(&writer_, env);
    }
    ~Writer()
    {
        vkp_resp_writer_deinit(&writer_);
    }
    Writer(const Writer &) = delete;
    Writer &operator=(const Writer &) = delete;
    vkp_resp_writer *get()
    {
        return &writer_;
    }
    vkp_status take(std::string *text)
    {
        vkp_bytes bytes = VKP_ZERO;
        const vkp_status status = vkp_resp_writer_take(&writer_, &bytes);
        if (status == VKP_OK) {
            *text = bytes.len ? std::string(reinterpret_cast<const char *>(bytes.data), bytes.len)
                              : std::string();
            vkp_bytes_unref(&bytes);
        }
        return status;
    }
    // What was written, or the status as a text.
    std::string text()
    {
        std::string out;
        const vkp_status status = take(&out);
        return status == VKP_OK ? out : std::string("status: ") + vkp_status_str(status);
    }

  private:
    vkp_resp_writer writer_;
};

class Reader {
  public:
    explicit Reader(const std::string &bytes) : bytes_(bytes)
    {
        if (vkp_resp_reader_open(nullptr, &reader_) != VKP_OK) {
            vkp_test_fail("a reader was refused");
        }
    }
    ~Reader()
    {
        vkp_resp_reader_unref(reader_);
    }
    Reader(const Reader &) = delete;
    Reader &operator=(const Reader &) = delete;
    // The one value of the bytes, or nullptr when they are not exactly one.
    const vkp_value *only()
    {
        const vkp_value *value = nullptr;
        size_t consumed = 0;
        const vkp_status status =
            vkp_resp_reader_scan(reader_, bytes_.data(), bytes_.size(), &value, &consumed);
        return status == VKP_OK && consumed == bytes_.size() ? value : nullptr;
    }

  private:
    std::string bytes_;
    vkp_resp_reader *reader_ = nullptr;
};

std::string converted(const std::string &bytes, int protocol)
{
    Reader reader(bytes);
    const vkp_value *value = reader.only();
    if (value == nullptr) {
        return "not one value";
    }
    Writer writer;
    vkp_resp_put_value(writer.get(), value, protocol);
    return writer.text();
}

// A value as its reader sees it: types, texts and elements, without attributes or spellings.
std::string meaning(const vkp_value *value)
{
    const std::string type = std::to_string(value->type);
    if (value->type < VKP_RESP_ARRAY) {
        const vkp_str text = vkp_value_get_str(value);
        const bool number = value->type == VKP_RESP_INTEGER || value->type == VKP_RESP_BOOL;
        return type + ":" +
               (number ? std::to_string(value->u.integer) : std::string(vkp_test_view(text)));
    }
    std::string out = type + "[";
    for (const vkp_value *child = vkp_value_get_first(value); child != nullptr;
         child = vkp_value_get_next(value, child)) {
        out += meaning(child) + ",";
    }
    return out + "]";
}

struct Conversion {
    const char *bytes;
    const char *resp3;
    const char *resp2;
};

const Conversion k_conversions[] = {
    {"+OK\r\n", "+OK\r\n", "+OK\r\n"},
    {"+\r\n", "+\r\n", "+\r\n"},
    {"-ERR no\r\n", "-ERR no\r\n", "-ERR no\r\n"},
    {"!6\r\nERR no\r\n", "!6\r\nERR no\r\n", "-ERR no\r\n"},
    {"!8\r\nERR\r\na\nb\r\n", "!8\r\nERR\r\na\nb\r\n", "-ERR  a b\r\n"},
    {":0\r\n", ":0\r\n", ":0\r\n"},
    {":+5\r\n", ":5\r\n", ":5\r\n"},
    {":-5\r\n", ":-5\r\n", ":-5\r\n"},
    {":9223372036854775807\r\n", ":9223372036854775807\r\n", ":9223372036854775807\r\n"},
    {":-9223372036854775808\r\n", ":-9223372036854775808\r\n", ":-9223372036854775808\r\n"},
    {"$0\r\n\r\n", "$0\r\n\r\n", "$0\r\n\r\n"},
    {"$4\r\na\r\nb\r\n", "$4\r\na\r\nb\r\n", "$4\r\na\r\nb\r\n"},
    {"=7\r\ntxt:abc\r\n", "=7\r\ntxt:abc\r\n", "$3\r\nabc\r\n"},
    {"=4\r\nmkd:\r\n", "=4\r\nmkd:\r\n", "$0\r\n\r\n"},
    {"_\r\n", "_\r\n", "$-1\r\n"},
    {"$-1\r\n", "_\r\n", "$-1\r\n"},
    // A RESP2 peer told the two nulls apart: it still can.
    {"*-1\r\n", "_\r\n", "*-1\r\n"},
    {"#t\r\n", "#t\r\n", ":1\r\n"},
    {"#f\r\n", "#f\r\n", ":0\r\n"},
    {",3.25\r\n", ",3.25\r\n", "$4\r\n3.25\r\n"},
    {",0.1\r\n", ",0.1\r\n", "$3\r\n0.1\r\n"},
    {",inf\r\n", ",inf\r\n", "$3\r\ninf\r\n"},
    {",-inf\r\n", ",-inf\r\n", "$4\r\n-inf\r\n"},
    {",nan\r\n", ",nan\r\n", "$3\r\nnan\r\n"},
    {"(123456789012345678901\r\n", "(123456789012345678901\r\n",
     "$21\r\n123456789012345678901\r\n"},
    {"(-1\r\n", "(-1\r\n", "$2\r\n-1\r\n"},
    {"*0\r\n", "*0\r\n", "*0\r\n"},
    {"*2\r\n:1\r\n_\r\n", "*2\r\n:1\r\n_\r\n", "*2\r\n:1\r\n$-1\r\n"},
    {"~2\r\n:1\r\n:2\r\n", "~2\r\n:1\r\n:2\r\n", "*2\r\n:1\r\n:2\r\n"},
    {"%2\r\n+a\r\n:1\r\n+b\r\n#t\r\n", "%2\r\n+a\r\n:1\r\n+b\r\n#t\r\n",
     "*4\r\n+a\r\n:1\r\n+b\r\n:1\r\n"},
    {"%0\r\n", "%0\r\n", "*0\r\n"},
    {">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nm\r\n",
     ">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nm\r\n",
     "*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nm\r\n"},
    {"*2\r\n%1\r\n+k\r\n~1\r\n,1.5\r\n*1\r\n%0\r\n", "*2\r\n%1\r\n+k\r\n~1\r\n,1.5\r\n*1\r\n%0\r\n",
     "*2\r\n*2\r\n+k\r\n*1\r\n$3\r\n1.5\r\n*1\r\n*0\r\n"},
    // Attributes inside a value belong to it; RESP2 has none. One before the value does not.
    {"*1\r\n|1\r\n+a\r\n:1\r\n:5\r\n", "*1\r\n|1\r\n+a\r\n:1\r\n:5\r\n", "*1\r\n:5\r\n"},
    {"*1\r\n|1\r\n+a\r\n|0\r\n:1\r\n*0\r\n", "*1\r\n|1\r\n+a\r\n|0\r\n:1\r\n*0\r\n",
     "*1\r\n*0\r\n"},
    {"|1\r\n+a\r\n:1\r\n:5\r\n", ":5\r\n", ":5\r\n"},
    // A push that a server slipped into an array uncounted is not an element.
    {"*2\r\n:1\r\n>3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nm\r\n:2\r\n", "*2\r\n:1\r\n:2\r\n",
     "*2\r\n:1\r\n:2\r\n"},
};

} // namespace

TEST_CASE("resp writer: each put writes its type", "[resp][writer]")
{
    Writer w;
    vkp_resp_put_simple(w.get(), vkp_str_of("OK"));
    CHECK(w.text() == "+OK\r\n");
    vkp_resp_put_simple(w.get(), vkp_str_of(""));
    CHECK(w.text() == "+\r\n");
    vkp_resp_put_error(w.get(), vkp_str_of("ERR no"));
    CHECK(w.text() == "-ERR no\r\n");
    vkp_resp_put_bulk(w.get(), "a\r\n\0b", 5);
    CHECK(w.text() == std::string("$5\r\na\r\n\0b\r\n", 11));
    vkp_resp_put_bulk(w.get(), nullptr, 0);
    CHECK(w.text() == "$0\r\n\r\n");
    vkp_resp_put_bool(w.get(), true);
    vkp_resp_put_bool(w.get(), false);
    CHECK(w.text() == "#t\r\n#f\r\n");
    vkp_resp_put_null(w.get());
    CHECK(w.text() == "_\r\n");
    vkp_resp_put_raw(w.get(), "*1\r\n", 4);
    vkp_resp_put_raw(w.get(), nullptr, 0);
    vkp_resp_put_raw(w.get(), "_\r\n", 3);
    CHECK(w.text() == "*1\r\n_\r\n");
    for (const char *number :
         {"0", "-1", "7", "10", "9223372036854775807", "-9223372036854775808"}) {
        vkp_resp_put_integer(w.get(), std::strtoll(number, nullptr, 10));
        CHECK(w.text() == ":" + std::string(number) + "\r\n");
    }
    const struct {
        vkp_resp_type type;
        const char *mark;
    } aggregates[] = {
        {VKP_RESP_ARRAY, "*"}, {VKP_RESP_SET, "~"},       {VKP_RESP_PUSH, ">"},
        {VKP_RESP_MAP, "%"},   {VKP_RESP_ATTRIBUTE, "|"},
    };
    for (const auto &aggregate : aggregates) {
        // The count is the wire's: pairs for maps and attributes.
        vkp_resp_put_aggregate(w.get(), aggregate.type, 0);
        vkp_resp_put_aggregate(w.get(), aggregate.type, 12);
        const std::string mark = aggregate.mark;
        CHECK(w.text() == mark + "0\r\n" + mark + "12\r\n");
    }
}

TEST_CASE("resp writer: a double written is the double read", "[resp][writer]")
{
    std::vector<double> numbers = {0.0,
                                   -0.0,
                                   0.1,
                                   -1.5,
                                   1e300,
                                   1e-300,
                                   123456789012345680.0,
                                   std::numeric_limits<double>::max(),
                                   std::numeric_limits<double>::lowest(),
                                   std::numeric_limits<double>::min(),
                                   std::numeric_limits<double>::denorm_min(),
                                   std::numeric_limits<double>::infinity(),
                                   -std::numeric_limits<double>::infinity()};
    std::mt19937_64 random(3);
    for (int i = 0; i < 5000; i++) {
        const uint64_t bits = random();
        double number;
        std::memcpy(&number, &bits, sizeof number);
        if (std::isfinite(number)) {
            numbers.push_back(number);
        }
    }
    size_t wrong = 0;
    for (double number : numbers) {
        Writer w;
        vkp_resp_put_double(w.get(), number);
        Reader reader(w.text());
        const vkp_value *value = reader.only();
        if (value == nullptr || value->type != VKP_RESP_DOUBLE) {
            wrong++;
            continue;
        }
        const double got = vkp_value_get_double(value);
        wrong += std::memcmp(&got, &number, sizeof got) != 0;
    }
    CHECK(wrong == 0);
    Writer w;
    vkp_resp_put_double(w.get(), std::nan(""));
    vkp_resp_put_double(w.get(), -std::nan(""));
    vkp_resp_put_double(w.get(), std::numeric_limits<double>::infinity());
    vkp_resp_put_double(w.get(), -std::numeric_limits<double>::infinity());
    vkp_resp_put_double(w.get(), 3);
    CHECK(w.text() == ",nan\r\n,nan\r\n,inf\r\n,-inf\r\n,3\r\n");
}

TEST_CASE("resp writer: puts follow each other into one block", "[resp][writer]")
{
    Env env;
    {
        Writer w(&env.test.env);
        std::string expected;
        for (int i = 0; i < 20000; i++) {
            const std::string text(static_cast<size_t>(i % 50), 'x');
            vkp_resp_put_bulk(w.get(), text.data(), text.size());
            vkp_resp_put_integer(w.get(), i);
            expected += "$" + std::to_string(text.size()) + "\r\n" + text +
                        "\r\n:" + std::to_string(i) + "\r\n";
        }
        CHECK(env.blocks() == 1);
        CHECK((w.text() == expected));
        CHECK(env.blocks() == 0);
    }
    CHECK(env.blocks() == 0);
}

TEST_CASE("resp writer: a value in RESP3, and as a RESP2 client gets it", "[resp][writer]")
{
    for (const Conversion &row : k_conversions) {
        INFO(row.bytes);
        CHECK(converted(row.bytes, 3) == row.resp3);
        CHECK(converted(row.bytes, 2) == row.resp2);
        // What was written for RESP3 reads as the same value and is written the same again.
        Reader original(row.bytes);
        Reader written(row.resp3);
        const vkp_value *before = original.only();
        const vkp_value *after = written.only();
        REQUIRE(before != nullptr);
        REQUIRE(after != nullptr);
        CHECK(meaning(before) == meaning(after));
        CHECK(converted(row.resp3, 3) == row.resp3);
        // RESP2 stays what it is in RESP2.
        CHECK(converted(row.resp2, 2) == row.resp2);
    }
}

TEST_CASE("resp writer: a value that is an element is written alone", "[resp][writer]")
{
    Reader reader("*3\r\n:1\r\n%1\r\n+k\r\n*1\r\n:2\r\n:3\r\n");
    const vkp_value *array = reader.only();
    REQUIRE(array != nullptr);
    const vkp_value *map = vkp_value_get_next(array, vkp_value_get_first(array));
    Writer w;
    vkp_resp_put_aggregate(w.get(), VKP_RESP_ARRAY, 2);
    vkp_resp_put_value(w.get(), map, 3);
    vkp_resp_put_value(w.get(), vkp_value_get_first(map), 2);
    CHECK(w.text() == "*2\r\n%1\r\n+k\r\n*1\r\n:2\r\n+k\r\n");
}

TEST_CASE("resp writer: an uncounted push is written whole when it is asked for itself",
          "[resp][writer]")
{
    Reader reader("*1\r\n>3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nm\r\n:2\r\n");
    const vkp_value *array = reader.only();
    REQUIRE(array != nullptr);
    const vkp_value *push = array + 1;
    REQUIRE((push->flags & VKP_VALUE_OUT_OF_BAND) != 0);
    Writer w;
    vkp_resp_put_value(w.get(), push, 3);
    CHECK(w.text() == ">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nm\r\n");
    vkp_resp_put_value(w.get(), push, 2);
    CHECK(w.text() == "*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nm\r\n");
}

TEST_CASE("resp writer: the deepest value is written without recursion", "[resp][writer]")
{
    vkp_resp_config config = VKP_ZERO;
    config.max_depth = 65000;
    vkp_resp_reader *reader = nullptr;
    REQUIRE(vkp_resp_reader_open(&config, &reader) == VKP_OK);
    std::string bytes;
    for (int i = 0; i < 65000; i++) {
        bytes += "~1\r\n";
    }
    bytes += "_\r\n";
    const vkp_value *value = nullptr;
    size_t consumed = 0;
    REQUIRE(vkp_resp_reader_scan(reader, bytes.data(), bytes.size(), &value, &consumed) == VKP_OK);
    Writer w;
    vkp_resp_put_value(w.get(), value, 3);
    CHECK((w.text() == bytes));
    vkp_resp_reader_unref(reader);
}

TEST_CASE("resp writer: a line break in a line is INVALID, kept until take", "[resp][writer]")
{
    for (const char *text : {"a\rb", "a\nb", "\r\n", "a\r\n+injected"}) {
        for (bool error : {false, true}) {
            INFO(text);
            Writer w;
            vkp_resp_put_integer(w.get(), 1);
            if (error) {
                vkp_resp_put_error(w.get(), vkp_str_of(text));
            } else {
                vkp_resp_put_simple(w.get(), vkp_str_of(text));
            }
            vkp_resp_put_integer(w.get(), 2);
            vkp_bytes marked = vkp_bytes_static("mark", 4);
            CHECK(vkp_resp_writer_take(w.get(), &marked) == VKP_ERR_INVALID);
            CHECK(marked.len == 4);
            CHECK(marked.block == nullptr);
            // Empty again, its error forgotten.
            CHECK(w.text().empty());
            vkp_resp_put_integer(w.get(), 3);
            CHECK(w.text() == ":3\r\n");
        }
    }
}

TEST_CASE("resp writer: above 4 GiB it is LIMIT, and nothing is read or allocated for it",
          "[resp][writer]")
{
#if SIZE_MAX > UINT32_MAX
    Env env;
    for (size_t len : {size_t{UINT32_MAX} + 1, size_t{UINT32_MAX} - 2, SIZE_MAX, SIZE_MAX - 8}) {
        INFO(len);
        Writer w(&env.test.env);
        vkp_resp_put_integer(w.get(), 1);
        vkp_resp_put_raw(w.get(), "x", len);
        CHECK(w.text() == "status: a configured limit was exceeded");
        vkp_resp_put_bulk(w.get(), "x", len);
        CHECK(w.text() == "status: a configured limit was exceeded");
        // The first error is the one that is told.
        vkp_resp_put_bulk(w.get(), "x", len);
        vkp_resp_put_simple(w.get(), vkp_str_of("\n"));
        CHECK(w.text() == "status: a configured limit was exceeded");
        vkp_resp_put_simple(w.get(), vkp_str_of("\n"));
        vkp_resp_put_bulk(w.get(), "x", len);
        CHECK(w.text() == "status: invalid argument or use");
    }
    CHECK(vkp_test_env_peak_bytes(&env.test) < 4096);
    CHECK(env.blocks() == 0);
#else
    SUCCEED("no size_t above 4 GiB here");
#endif
}

TEST_CASE("resp writer: memory may fail at every allocation; take tells, and it can be used again",
          "[resp][writer][faults]")
{
    Reader reader("*3\r\n%1\r\n+k\r\n,1.5\r\n!3\r\na\nb\r\n=7\r\ntxt:abc\r\n");
    const vkp_value *value = reader.only();
    REQUIRE(value != nullptr);
    Env env;
    const auto write = [&](Writer &w) {
        vkp_resp_put_aggregate(w.get(), VKP_RESP_ARRAY, 9);
        vkp_resp_put_simple(w.get(), vkp_str_of("simple"));
        vkp_resp_put_error(w.get(), vkp_str_of("ERR error"));
        vkp_resp_put_integer(w.get(), 123456);
        vkp_resp_put_double(w.get(), 0.25);
        vkp_resp_put_bool(w.get(), true);
        vkp_resp_put_null(w.get());
        const std::string large(300, 'x');
        vkp_resp_put_bulk(w.get(), large.data(), large.size());
        for (int protocol : {3, 2}) {
            for (int i = 0; i < 10; i++) {
                vkp_resp_put_value(w.get(), value, protocol);
            }
        }
    };
    std::string expected;
    uint64_t calls = 0;
    {
        Writer w(&env.test.env);
        write(w);
        REQUIRE(w.take(&expected) == VKP_OK);
        calls = vkp_test_env_calls(&env.test);
        REQUIRE(calls > 2);
    }
    for (vkp_test_fault kind : {VKP_TEST_FAULT_ONCE, VKP_TEST_FAULT_FROM}) {
        for (uint64_t k = 1; k <= calls; k++) {
            INFO("kind " << kind << " k " << k);
            Writer w(&env.test.env);
            vkp_test_env_fault(&env.test, kind, k);
            write(w);
            std::string out = "untouched";
            CHECK(w.take(&out) == VKP_ERR_NOMEM);
            CHECK(out == "untouched");
            CHECK(env.blocks() == 0);
            vkp_test_env_fault(&env.test, VKP_TEST_FAULT_NONE, 0);
            write(w);
            CHECK(w.take(&out) == VKP_OK);
            CHECK((out == expected));
        }
    }
    CHECK(env.blocks() == 0);
}

TEST_CASE("resp writer: the bytes taken are an ordinary shared block", "[resp][writer]")
{
    Env env;
    Writer w(&env.test.env);
    vkp_resp_put_simple(w.get(), vkp_str_of("first"));
    vkp_bytes first = VKP_ZERO;
    REQUIRE(vkp_resp_writer_take(w.get(), &first) == VKP_OK);
    vkp_bytes other = vkp_bytes_ref(&first);
    vkp_resp_put_simple(w.get(), vkp_str_of("second"));
    vkp_bytes second = VKP_ZERO;
    REQUIRE(vkp_resp_writer_take(w.get(), &second) == VKP_OK);
    vkp_bytes_unref(&first);
    CHECK(std::string(reinterpret_cast<const char *>(other.data), other.len) == "+first\r\n");
    vkp_bytes_unref(&other);
    vkp_bytes_unref(&second);
    CHECK(env.blocks() == 0);
}

TEST_CASE("resp writer: nothing written is nothing taken; deinit drops what was built",
          "[resp][writer]")
{
    Env env;
    Writer w(&env.test.env);
    vkp_bytes bytes = vkp_bytes_static("mark", 4);
    REQUIRE(vkp_resp_writer_take(w.get(), &bytes) == VKP_OK);
    CHECK(bytes.len == 0);
    vkp_bytes_unref(&bytes);
    vkp_resp_put_simple(w.get(), vkp_str_of("dropped"));
    CHECK(env.blocks() == 1);
    vkp_resp_writer_deinit(w.get());
    CHECK(env.blocks() == 0);
    vkp_resp_writer_deinit(w.get());
    CHECK(env.blocks() == 0);
}
