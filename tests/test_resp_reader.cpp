// SPDX-License-Identifier: MIT
//
// The RESP reader: every type, every refusal, every limit, and the one property that holds it all
// together: however the bytes arrive, the values, the verdict and its position are the same.
#include "support/catch.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "support/numeric_locale.h"
#include "support/support.h"

namespace {

using Env = vkp_test_counted;

vkp_resp_config plain_config()
{
    vkp_resp_config config = VKP_ZERO;
    return config;
}

vkp_resp_config lenient_config()
{
    vkp_resp_config config = VKP_ZERO;
    config.lenient = true;
    return config;
}

class Reader {
  public:
    explicit Reader(const vkp_resp_config &config)
    {
        if (vkp_resp_reader_open(&config, &reader_) != VKP_OK) {
            vkp_test_fail("a reader was refused");
        }
    }
    Reader() : Reader(plain_config())
    {
    }
    ~Reader()
    {
        vkp_resp_reader_unref(reader_);
    }
    Reader(const Reader &) = delete;
    Reader &operator=(const Reader &) = delete;
    vkp_resp_reader *get() const
    {
        return reader_;
    }
    vkp_status feed(const std::string &bytes)
    {
        return vkp_resp_reader_feed(reader_, bytes.data(), bytes.size());
    }
    vkp_status next(const vkp_value **value)
    {
        return vkp_resp_reader_next(reader_, value);
    }
    // Fed and found incomplete, or refused: what is said of it.
    vkp_status verdict(const std::string &bytes)
    {
        const vkp_status fed = feed(bytes);
        const vkp_value *value = nullptr;
        return fed != VKP_OK ? fed : next(&value);
    }
    std::string reason() const
    {
        uint64_t position = 0;
        return vkp_resp_reader_get_error(reader_, &position);
    }
    uint64_t position() const
    {
        uint64_t position = UINT64_MAX;
        (void)vkp_resp_reader_get_error(reader_, &position);
        return position;
    }

  private:
    vkp_resp_reader *reader_ = nullptr;
};

// The first place of a tree: the value itself, or the first attribute before it.
const vkp_value *tree_begin(const vkp_value *root)
{
    while (root->attributes != 0) {
        root -= root->attributes;
    }
    return root;
}

std::string place_text(const vkp_value *value)
{
    static const char *const names[] = {"null",   "string", "error", "integer", "double", "bool",
                                        "bignum", "array",  "set",   "push",    "map",    "attr"};
    std::string out = value->type < 12 ? names[value->type] : "?";
    if (value->flags != 0) {
        out += "/" + std::to_string(value->flags);
    }
    switch (value->type) {
    case VKP_RESP_STRING:
    case VKP_RESP_ERROR:
    case VKP_RESP_DOUBLE:
    case VKP_RESP_BIGNUM:
        out += "(" + std::string(value->u.str, value->len) + ")";
        break;
    case VKP_RESP_INTEGER:
    case VKP_RESP_BOOL:
        out += "(" + std::to_string(value->u.integer) + ")";
        break;
    case VKP_RESP_NULL:
        break;
    default:
        out += "[" + std::to_string(value->len) + "]";
        break;
    }
    if (value->span != 1) {
        out += "+" + std::to_string(value->span);
    }
    if (value->attributes != 0) {
        out += "@" + std::to_string(value->attributes);
    }
    return out;
}

// Everything the reader said about a frame, place by place.
std::string tree_text(const vkp_value *root)
{
    std::string out;
    for (const vkp_value *at = tree_begin(root); at < root + root->span; at++) {
        out += (out.empty() ? "" : " ") + place_text(at);
    }
    return out;
}

bool is_aggregate(const vkp_value *value)
{
    return value->type >= VKP_RESP_ARRAY && value->type <= VKP_RESP_ATTRIBUTE;
}

// What holds of every tree: an aggregate has `len` elements by the walk, its span is the sum of
// what stands in it, and attributes are where they are said to be.
bool tree_is_sound(const vkp_value *root)
{
    const vkp_value *end = root + root->span;
    for (const vkp_value *at = tree_begin(root); at < end; at++) {
        if (at->span == 0 || at + at->span > end) {
            return false;
        }
        if (at->attributes != 0 &&
            at[-static_cast<ptrdiff_t>(at->attributes)].type != VKP_RESP_ATTRIBUTE) {
            return false;
        }
        const vkp_value *child = vkp_value_get_first(at);
        if (!is_aggregate(at)) {
            if (at->span != 1 || child != nullptr) {
                return false;
            }
            continue;
        }
        size_t children = 0;
        for (; child != nullptr; child = vkp_value_get_next(at, child)) {
            if (child <= at || child >= at + at->span || child->type == VKP_RESP_ATTRIBUTE) {
                return false;
            }
            children++;
        }
        size_t places = 1;
        for (const vkp_value *in = at + 1; in < at + at->span; in += in->span) {
            places += in->span;
        }
        if (children != at->len || places != at->span) {
            return false;
        }
    }
    return true;
}

struct Outcome {
    std::vector<std::string> frames;
    vkp_status status = VKP_OK;
    uint64_t position = 0;
    std::string reason;
    bool sound = true;
    size_t consumed = 0; // scan only
    bool same(const Outcome &other) const
    {
        return frames == other.frames && status == other.status && position == other.position &&
               reason == other.reason && sound && other.sound;
    }
};

std::string outcome_text(const Outcome &outcome)
{
    std::string out;
    for (const std::string &frame : outcome.frames) {
        out += frame + "\n";
    }
    return out + vkp_status_str(outcome.status) + " at " + std::to_string(outcome.position) + ": " +
           outcome.reason + (outcome.sound ? "" : " (unsound)");
}

void note(Outcome &outcome, const vkp_value *value)
{
    outcome.frames.push_back(tree_text(value));
    outcome.sound = outcome.sound && tree_is_sound(value);
}

void finish(Outcome &outcome, const vkp_resp_reader *reader, vkp_status status)
{
    outcome.status = status;
    outcome.reason = vkp_resp_reader_get_error(reader, &outcome.position);
}

// Feeds the bytes cut at the given places (ascending), taking what is whole after each piece.
Outcome read_fed(const std::string &bytes, const std::vector<size_t> &cuts,
                 const vkp_resp_config &config)
{
    Reader reader(config);
    Outcome outcome;
    const vkp_value *value = nullptr;
    size_t from = 0;
    vkp_status status = VKP_OK;
    for (size_t i = 0; i <= cuts.size(); i++) {
        const size_t to = i < cuts.size() ? cuts[i] : bytes.size();
        // Of the exact size and on the heap: a reader past the end is caught by a sanitizer.
        const std::vector<char> piece(bytes.begin() + static_cast<ptrdiff_t>(from),
                                      bytes.begin() + static_cast<ptrdiff_t>(to));
        status = vkp_resp_reader_feed(reader.get(), piece.data(), piece.size());
        from = to;
        if (status != VKP_OK) {
            break;
        }
        while ((status = reader.next(&value)) == VKP_OK) {
            note(outcome, value);
        }
    }
    finish(outcome, reader.get(), status);
    return outcome;
}

// The same by scan: after EMPTY the window grows to the next cut, in another place of memory, and
// the old one is gone.
Outcome read_scanned(const std::string &bytes, const std::vector<size_t> &cuts,
                     const vkp_resp_config &config)
{
    Reader reader(config);
    Outcome outcome;
    const vkp_value *value = nullptr;
    size_t begin = 0;
    vkp_status status = VKP_OK;
    for (size_t i = 0; i <= cuts.size(); i++) {
        const size_t end = i < cuts.size() ? cuts[i] : bytes.size();
        do {
            const std::vector<char> window(bytes.begin() + static_cast<ptrdiff_t>(begin),
                                           bytes.begin() + static_cast<ptrdiff_t>(end));
            size_t consumed = 0;
            status =
                vkp_resp_reader_scan(reader.get(), window.data(), window.size(), &value, &consumed);
            if (status == VKP_OK) {
                note(outcome, value);
                begin += consumed;
                outcome.consumed += consumed;
            }
        } while (status == VKP_OK);
        if (status != VKP_ERR_EMPTY) {
            break;
        }
    }
    finish(outcome, reader.get(), status);
    return outcome;
}

std::vector<size_t> every_byte(const std::string &bytes)
{
    std::vector<size_t> cuts;
    for (size_t i = 1; i < bytes.size(); i++) {
        cuts.push_back(i);
    }
    return cuts;
}

// Splits the bytes in every way that is affordable and returns how many differ from the whole.
size_t differing_splits(const std::string &bytes, const vkp_resp_config &config,
                        std::string *example)
{
    const Outcome whole = read_fed(bytes, {}, config);
    size_t differing = 0;
    const auto compare = [&](const Outcome &other, const std::string &how) {
        if (!whole.same(other)) {
            differing++;
            *example = how + ":\n" + outcome_text(other) + "\ninstead of\n" + outcome_text(whole);
        }
    };
    compare(read_fed(bytes, every_byte(bytes), config), "byte by byte");
    compare(read_scanned(bytes, {}, config), "one window");
    compare(read_scanned(bytes, every_byte(bytes), config), "windows growing by one");
    for (size_t cut = 1; cut < bytes.size(); cut++) {
        compare(read_fed(bytes, {cut}, config), "fed in two at " + std::to_string(cut));
        compare(read_scanned(bytes, {cut}, config), "scanned in two at " + std::to_string(cut));
    }
    return differing;
}

std::string repeat(const std::string &text, size_t times)
{
    std::string out;
    out.reserve(text.size() * times);
    for (size_t i = 0; i < times; i++) {
        out += text;
    }
    return out;
}

bool contains(const std::string &text, const std::string &part)
{
    return text.find(part) != std::string::npos;
}

std::string bulk(const std::string &text)
{
    return "$" + std::to_string(text.size()) + "\r\n" + text + "\r\n";
}

struct Example {
    const char *bytes;
    const char *expected;
};

const Example k_examples[] = {
    {"+OK\r\n", "string/1(OK)"},
    {"+\r\n", "string/1()"},
    {"-ERR no\r\n", "error/1(ERR no)"},
    {"-\r\n", "error/1()"},
    {":0\r\n", "integer(0)"},
    {":+7\r\n", "integer(7)"},
    {":-42\r\n", "integer(-42)"},
    {":9223372036854775807\r\n", "integer(9223372036854775807)"},
    {":-9223372036854775808\r\n", "integer(-9223372036854775808)"},
    {"$0\r\n\r\n", "string()"},
    {"$5\r\nhello\r\n", "string(hello)"},
    {"$4\r\na\r\nb\r\n", "string(a\r\nb)"},
    {"$-1\r\n", "null/4"},
    {"*-1\r\n", "null/8"},
    {"_\r\n", "null"},
    {"#t\r\n", "bool(1)"},
    {"#f\r\n", "bool(0)"},
    {"!5\r\nE a\nb\r\n", "error(E a\nb)"},
    {"!0\r\n\r\n", "error()"},
    {"=7\r\ntxt:abc\r\n", "string/2(abc)"},
    {"=4\r\nmkd:\r\n", "string/2()"},
    {"(0\r\n", "bignum(0)"},
    {"(-3492890328409238509324850943850943825024385\r\n",
     "bignum(-3492890328409238509324850943850943825024385)"},
    {"(+18446744073709551616\r\n", "bignum(+18446744073709551616)"},
    {",3.25\r\n", "double(3.25)"},
    {",-0\r\n", "double(-0)"},
    {",inf\r\n", "double(inf)"},
    {",-inf\r\n", "double(-inf)"},
    {",nan\r\n", "double(nan)"},
    {"*0\r\n", "array[0]"},
    {"~0\r\n", "set[0]"},
    {"%0\r\n", "map[0]"},
    {"*2\r\n:1\r\n$1\r\na\r\n", "array[2]+3 integer(1) string(a)"},
    {"~1\r\n#t\r\n", "set[1]+2 bool(1)"},
    {"%2\r\n+a\r\n:1\r\n+b\r\n:2\r\n", "map[4]+5 string/1(a) integer(1) string/1(b) integer(2)"},
    {">1\r\n+ping\r\n", "push[1]+2 string/1(ping)"},
    {">2\r\n=8\r\ntxt:kind\r\n_\r\n", "push[2]+3 string/2(kind) null"},
    {"*3\r\n*0\r\n*1\r\n*0\r\n:9\r\n", "array[3]+5 array[0] array[1]+2 array[0] integer(9)"},
    {"%1\r\n*1\r\n:1\r\n%1\r\n+k\r\n~0\r\n",
     "map[2]+6 array[1]+2 integer(1) map[2]+3 string/1(k) set[0]"},
    // Attributes stand before what they annotate and count for nobody.
    {"|1\r\n+ttl\r\n:3\r\n:5\r\n", "attr[2]+3 string/1(ttl) integer(3) integer(5)@3"},
    {"|0\r\n_\r\n", "attr[0] null@1"},
    {"|1\r\n+a\r\n:1\r\n|1\r\n+b\r\n:2\r\n$1\r\nx\r\n",
     "attr[2]+3 string/1(a) integer(1) attr[2]+3@3 string/1(b) integer(2) string(x)@3"},
    {"*2\r\n:1\r\n|1\r\n+k\r\n+v\r\n:2\r\n",
     "array[2]+6 integer(1) attr[2]+3 string/1(k) string/1(v) integer(2)@3"},
    {"%1\r\n|1\r\n+a\r\n+b\r\n+key\r\n|0\r\n+value\r\n",
     "map[2]+7 attr[2]+3 string/1(a) string/1(b) string/1(key)@3 attr[0] string/1(value)@1"},
    {"|1\r\n|1\r\n+in\r\n:0\r\n+k\r\n*1\r\n:1\r\n*1\r\n|0\r\n:2\r\n",
     "attr[2]+7 attr[2]+3 string/1(in) integer(0) string/1(k)@3 array[1]+2 integer(1) "
     "array[1]+3@7 attr[0] integer(2)@1"},
    {"*1\r\n|1\r\n+k\r\n+v\r\n*0\r\n", "array[1]+5 attr[2]+3 string/1(k) string/1(v) array[0]@3"},
    // What servers push.
    {">3\r\n$9\r\nsubscribe\r\n$2\r\nc1\r\n:1\r\n",
     "push[3]+4 string(subscribe) string(c1) integer(1)"},
    {">3\r\n$12\r\npunsubscribe\r\n_\r\n:0\r\n", "push[3]+4 string(punsubscribe) null integer(0)"},
    {">3\r\n$7\r\nmessage\r\n$2\r\nc1\r\n$2\r\nhi\r\n",
     "push[3]+4 string(message) string(c1) string(hi)"},
    {">4\r\n$8\r\npmessage\r\n$2\r\nc*\r\n$2\r\nc1\r\n$2\r\nhi\r\n",
     "push[4]+5 string(pmessage) string(c*) string(c1) string(hi)"},
    {">2\r\n$10\r\ninvalidate\r\n*1\r\n$2\r\nk1\r\n",
     "push[2]+4 string(invalidate) array[1]+2 string(k1)"},
    {">2\r\n$10\r\ninvalidate\r\n*-1\r\n", "push[2]+3 string(invalidate) null/8"},
    {">2\r\n$21\r\ntracking-redir-broken\r\n:6\r\n",
     "push[2]+3 string(tracking-redir-broken) integer(6)"},
    // A message push that a server puts into EXEC's array without counting it.
    {"*2\r\n:1\r\n>3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nm\r\n:2\r\n",
     "array[2]+7 integer(1) push/16[3]+4 string(message) string(c) string(m) integer(2)"},
    {"*1\r\n>4\r\n$8\r\npmessage\r\n$1\r\n*\r\n$1\r\nc\r\n$1\r\nm\r\n>3\r\n$8\r\nsmessage\r\n$1\r\n"
     "c\r\n$1\r\nm\r\n+OK\r\n",
     "array[1]+11 push/16[4]+5 string(pmessage) string(*) string(c) string(m) push/16[3]+4 "
     "string(smessage) string(c) string(m) string/1(OK)"},
    {"*1\r\n>3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n",
     "array[1]+5 push[3]+4 string(subscribe) string(c) integer(1)"},
};

} // namespace

TEST_CASE("resp reader: open refuses what it cannot keep", "[resp]")
{
    vkp_resp_reader *reader = nullptr;
    CHECK(vkp_resp_reader_open(nullptr, nullptr) == VKP_ERR_INVALID);
    vkp_resp_config config = plain_config();
    config.max_depth = 65001;
    CHECK(vkp_resp_reader_open(&config, &reader) == VKP_ERR_INVALID);
#if SIZE_MAX > UINT32_MAX
    config = plain_config();
    config.max_frame_bytes = size_t{UINT32_MAX} + 1;
    CHECK(vkp_resp_reader_open(&config, &reader) == VKP_ERR_INVALID);
#endif
    CHECK(reader == nullptr);
    vkp_resp_reader_unref(nullptr);

    Env env;
    config = plain_config();
    config.env = &env.test.env;
    vkp_test_env_fault(&env.test, VKP_TEST_FAULT_ONCE, 1);
    CHECK(vkp_resp_reader_open(&config, &reader) == VKP_ERR_NOMEM);
    CHECK(reader == nullptr);
    CHECK(env.blocks() == 0);
}

TEST_CASE("resp reader: no config means all defaults, and a config is copied", "[resp]")
{
    vkp_resp_reader *reader = nullptr;
    REQUIRE(vkp_resp_reader_open(nullptr, &reader) == VKP_OK);
    const vkp_value *value = nullptr;
    CHECK(vkp_resp_reader_feed(reader, ":5\r\n", 4) == VKP_OK);
    CHECK(vkp_resp_reader_next(reader, &value) == VKP_OK);
    CHECK(value->u.integer == 5);
    vkp_resp_reader_unref(reader);

    auto config = std::make_unique<vkp_resp_config>();
    *config = plain_config();
    config->max_bulk_bytes = 3;
    Reader small(*config);
    config.reset();
    CHECK(small.verdict("$4\r\n") == VKP_ERR_LIMIT);
}

TEST_CASE("resp reader: null arguments are INVALID and do no harm", "[resp]")
{
    Reader reader;
    const vkp_value *value = nullptr;
    size_t consumed = 7;
    CHECK(vkp_resp_reader_feed(nullptr, "x", 1) == VKP_ERR_INVALID);
    CHECK(vkp_resp_reader_feed(reader.get(), nullptr, 1) == VKP_ERR_INVALID);
    CHECK(vkp_resp_reader_feed(reader.get(), nullptr, 0) == VKP_OK);
    CHECK(vkp_resp_reader_next(nullptr, &value) == VKP_ERR_INVALID);
    CHECK(vkp_resp_reader_next(reader.get(), nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_resp_reader_scan(nullptr, "x", 1, &value, &consumed) == VKP_ERR_INVALID);
    CHECK(vkp_resp_reader_scan(reader.get(), nullptr, 1, &value, &consumed) == VKP_ERR_INVALID);
    CHECK(vkp_resp_reader_scan(reader.get(), "x", 1, nullptr, &consumed) == VKP_ERR_INVALID);
    CHECK(vkp_resp_reader_scan(reader.get(), "x", 1, &value, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_resp_reader_scan(reader.get(), nullptr, 0, &value, &consumed) == VKP_ERR_EMPTY);
    CHECK(vkp_resp_reader_next(reader.get(), &value) == VKP_ERR_EMPTY);
    CHECK(value == nullptr);
    CHECK(consumed == 7);
    CHECK(reader.reason().empty());
    CHECK(reader.verdict(":1\r\n") == VKP_OK);
}

TEST_CASE("resp reader: every type, as it stands in the tree", "[resp]")
{
    for (const Example &example : k_examples) {
        INFO(example.bytes);
        for (const vkp_resp_config &config : {plain_config(), lenient_config()}) {
            const Outcome outcome = read_fed(example.bytes, {}, config);
            REQUIRE(outcome.frames.size() == 1);
            CHECK(outcome.frames[0] == example.expected);
            CHECK(outcome.status == VKP_ERR_EMPTY);
            CHECK(outcome.reason.empty());
            CHECK(outcome.sound);
        }
    }
}

TEST_CASE("resp reader: the result is the same however the input is split", "[resp][split]")
{
    std::string all;
    std::string example;
    for (const Example &each : k_examples) {
        INFO(each.bytes);
        const size_t differing = differing_splits(each.bytes, plain_config(), &example);
        INFO(example);
        CHECK(differing == 0);
        all += each.bytes;
    }
    const Outcome whole = read_fed(all, {}, plain_config());
    CHECK(whole.frames.size() == sizeof k_examples / sizeof k_examples[0]);
    const Outcome fed = read_fed(all, every_byte(all), plain_config());
    CHECK(fed.same(whole));
    const Outcome scanned = read_scanned(all, every_byte(all), plain_config());
    CHECK(scanned.same(whole));
    CHECK(scanned.consumed == all.size());
    std::mt19937 random(1);
    for (int round = 0; round < 200; round++) {
        std::vector<size_t> cuts;
        for (size_t at = 1 + random() % 60; at < all.size(); at += 1 + random() % 60) {
            cuts.push_back(at);
        }
        REQUIRE(read_fed(all, cuts, plain_config()).same(whole));
        REQUIRE(read_scanned(all, cuts, plain_config()).same(whole));
    }
}

TEST_CASE("resp reader: incomplete input is EMPTY at every byte, and asks for no more than is due",
          "[resp][split]")
{
    for (const Example &each : k_examples) {
        const std::string bytes = each.bytes;
        Reader reader;
        const vkp_value *value = nullptr;
        for (size_t i = 0; i < bytes.size(); i++) {
            INFO(bytes << " at " << i);
            REQUIRE(reader.next(&value) == VKP_ERR_EMPTY);
            REQUIRE(reader.feed(bytes.substr(i, 1)) == VKP_OK);
        }
        INFO(bytes);
        // Nothing behind the last byte is needed to know that the value is whole.
        CHECK(reader.next(&value) == VKP_OK);
        CHECK(reader.next(&value) == VKP_ERR_EMPTY);
    }
}

namespace {

// Random trees together with what the reader must say of them.
class Generator {
  public:
    explicit Generator(unsigned seed) : random_(seed), streaming_(seed)
    {
    }

    std::string bytes;
    std::string streamed; // the same value with some of its types streamed
    std::vector<std::string> places;

    void value(int depth, uint32_t attributes)
    {
        while (random_() % 12 == 0 && depth < 6) {
            attributes = attribute(depth, attributes);
        }
        const std::string text(random_() % 9, static_cast<char>('a' + random_() % 26));
        const std::string number = std::to_string(static_cast<int64_t>(random_()) - 2000000000);
        switch (random_() % (depth < 6 ? 16 : 10)) {
        case 0:
            return leaf("+" + text + "\r\n", "string/1(" + text + ")", attributes);
        case 1:
            return leaf("-" + text + "\r\n", "error/1(" + text + ")", attributes);
        case 2:
            return leaf(":" + number + "\r\n", "integer(" + number + ")", attributes);
        case 3:
            return leaf("_\r\n", "null", attributes);
        case 4:
            return random_() % 2 ? leaf("$-1\r\n", "null/4", attributes)
                                 : leaf("*-1\r\n", "null/8", attributes);
        case 5:
            return leaf("#t\r\n", "bool(1)", attributes);
        case 6:
            return leaf(",-1.5e3\r\n", "double(-1.5e3)", attributes);
        case 7:
            return leaf("(123456789012345678901\r\n", "bignum(123456789012345678901)", attributes);
        case 8:
            return leaf("!" + counted(text), "error(" + text + ")", attributes);
        case 9:
            return string(text, attributes);
        case 10:
            return leaf("=" + counted("txt:" + text), "string/2(" + text + ")", attributes);
        case 11:
            return aggregate('%', "map", depth, attributes);
        case 12:
            return aggregate('~', "set", depth, attributes);
        case 13:
            return aggregate('>', "push", depth, attributes);
        default:
            return aggregate('*', "array", depth, attributes);
        }
    }

  private:
    std::mt19937 random_;
    std::mt19937 streaming_;

    void string(const std::string &text, uint32_t attributes)
    {
        std::string wire = bulk(text);
        if (streaming_() % 2 == 0) {
            wire = "$?\r\n";
            for (size_t at = 0; at < text.size();) {
                const std::string chunk = text.substr(at, 1 + streaming_() % 4);
                wire += ";" + counted(chunk);
                at += chunk.size();
            }
            wire += ";0\r\n";
        }
        const std::string before = streamed;
        leaf(bulk(text), "string(" + text + ")", attributes);
        streamed = before + wire;
    }
    static std::string counted(const std::string &text)
    {
        return std::to_string(text.size()) + "\r\n" + text + "\r\n";
    }
    void leaf(const std::string &wire, const std::string &expected, uint32_t attributes)
    {
        bytes += wire;
        streamed += wire;
        place(expected, 1, attributes, places.size());
    }
    void place(const std::string &text, size_t span, uint32_t attributes, size_t at)
    {
        std::string whole = text;
        if (span != 1) {
            whole += "+" + std::to_string(span);
        }
        if (attributes != 0) {
            whole += "@" + std::to_string(attributes);
        }
        if (at == places.size()) {
            places.push_back(whole);
        } else {
            places[at] = whole;
        }
    }
    void aggregate(char mark, const char *name, int depth, uint32_t attributes)
    {
        const size_t at = places.size();
        const size_t n = random_() % 4 + (mark == '>' ? 1 : 0);
        const size_t elements = mark == '%' || mark == '|' ? 2 * n : n;
        const bool endless = (mark == '*' || mark == '~' || mark == '%') && streaming_() % 2 == 0;
        bytes += mark + std::to_string(n) + "\r\n";
        streamed += mark + (endless ? "?" : std::to_string(n)) + "\r\n";
        places.emplace_back();
        for (size_t i = 0; i < elements; i++) {
            if (i == 0 && mark == '>') {
                string("kind", 0);
            } else {
                value(depth + 1, 0);
            }
        }
        streamed += endless ? ".\r\n" : "";
        place(name + ("[" + std::to_string(elements) + "]"), places.size() - at, attributes, at);
    }
    uint32_t attribute(int depth, uint32_t attributes)
    {
        const size_t at = places.size();
        aggregate('|', "attr", depth, attributes);
        return static_cast<uint32_t>(places.size() - at);
    }
};

} // namespace

TEST_CASE("resp reader: random trees come out as they were made, however split", "[resp][split]")
{
    for (unsigned seed = 0; seed < 300; seed++) {
        Generator generator(seed);
        generator.value(0, 0);
        std::string expected;
        for (const std::string &place : generator.places) {
            expected += (expected.empty() ? "" : " ") + place;
        }
        INFO("seed " << seed << "\n" << generator.bytes);
        const Outcome whole = read_fed(generator.bytes, {}, plain_config());
        REQUIRE(whole.frames == std::vector<std::string>{expected});
        REQUIRE(whole.sound);
        REQUIRE(read_fed(generator.bytes, every_byte(generator.bytes), plain_config()).same(whole));
        REQUIRE(
            read_scanned(generator.bytes, every_byte(generator.bytes), plain_config()).same(whole));
        REQUIRE(vkp_resp_get_frame_len(reinterpret_cast<const uint8_t *>(generator.bytes.data()),
                                       generator.bytes.size()) == generator.bytes.size());
    }
}

namespace {

struct Refusal {
    const char *bytes;
    vkp_status strict;
    vkp_status lenient;
    uint64_t position; // in strict mode
    const char *word;  // of the reason, in strict mode
};

const vkp_status OK = VKP_OK;
const vkp_status BAD = VKP_ERR_PROTOCOL;

const Refusal k_refusals[] = {
    // Trailers of counted strings.
    {"$5\r\nhelloXY", BAD, BAD, 9, "CRLF"},
    {"$5\r\nhello\rX", BAD, BAD, 9, "CRLF"},
    {"$5\r\nhello\n\r", BAD, BAD, 9, "CRLF"},
    {"$5\r\nhello6\r\n", BAD, BAD, 9, "CRLF"},
    {"$0\r\nab", BAD, BAD, 4, "CRLF"},
    {"!3\r\nabcde", BAD, BAD, 7, "CRLF"},
    {"=5\r\ntxt:axx", BAD, BAD, 9, "CRLF"},
    // Lengths.
    {"$+3\r\nabc\r\n", BAD, BAD, 1, "sign"},
    {"$03\r\nabc\r\n", BAD, BAD, 1, "zero"},
    {"$00\r\n\r\n", BAD, BAD, 1, "zero"},
    {"$\r\n", BAD, BAD, 1, "digit"},
    {"$a\r\n", BAD, BAD, 1, "digit"},
    {"$ 3\r\nabc\r\n", BAD, BAD, 1, "digit"},
    {"$3 \r\nabc\r\n", BAD, BAD, 2, "CRLF"},
    {"$3\nabc\r\n", BAD, BAD, 2, "CRLF"},
    {"$3\rxabc\r\n", BAD, BAD, 3, "LF"},
    {"$-2\r\n", BAD, BAD, 2, "negative"},
    {"$-0\r\n", BAD, BAD, 2, "negative"},
    {"$-\r\n", BAD, BAD, 2, "digit"},
    {"$-01\r\n", BAD, BAD, 2, "zero"},
    {"$99999999999999999999\r\n", BAD, BAD, 19, "64 bits"},
    {"$?\r\n", BAD, BAD, 1, "digit"},
    {"!-1\r\n", BAD, BAD, 1, "sign"},
    {"=-1\r\n", BAD, BAD, 1, "sign"},
    {"*-2\r\n", BAD, BAD, 2, "negative"},
    {"*1x\r\n", BAD, BAD, 2, "CRLF"},
    {"*+1\r\n", BAD, BAD, 1, "sign"},
    {"*\r\n", BAD, BAD, 1, "digit"},
    {"*01\r\n", BAD, BAD, 1, "zero"},
    {"*?\r\n", BAD, BAD, 1, "digit"},
    {"~-1\r\n", BAD, BAD, 1, "sign"},
    {"%-1\r\n", BAD, BAD, 1, "sign"},
    {"|-1\r\n", BAD, BAD, 1, "sign"},
    {">-1\r\n", BAD, OK, 1, "sign"},
    {">-2\r\n", BAD, BAD, 1, "sign"},
    // Integers.
    {":007\r\n", BAD, BAD, 1, "zero"},
    {":-07\r\n", BAD, BAD, 2, "zero"},
    {":-0\r\n", BAD, BAD, 2, "negative"},
    {":\r\n", BAD, BAD, 1, "digit"},
    {":-\r\n", BAD, BAD, 2, "digit"},
    {":+\r\n", BAD, BAD, 2, "digit"},
    {":+-1\r\n", BAD, BAD, 2, "digit"},
    {":1.0\r\n", BAD, BAD, 2, "CRLF"},
    {":1 \r\n", BAD, BAD, 2, "CRLF"},
    {":9223372036854775808\r\n", BAD, BAD, 19, "64 bits"},
    {":-9223372036854775809\r\n", BAD, BAD, 20, "64 bits"},
    {":18446744073709551617\r\n", BAD, BAD, 20, "64 bits"},
    // Booleans and null.
    {"#T\r\n", BAD, BAD, 1, "boolean"},
    {"#\r\n", BAD, BAD, 1, "boolean"},
    {"#foobar\r\n", BAD, BAD, 2, "CRLF"},
    {"#t\n", BAD, BAD, 2, "CRLF"},
    {"_x\r\n", BAD, BAD, 1, "CRLF"},
    {"_\rx", BAD, BAD, 2, "LF"},
    // Doubles.
    {",.5\r\n", BAD, OK, 1, "double"},
    {",-.5\r\n", BAD, OK, 1, "double"},
    {",5.\r\n", BAD, OK, 1, "double"},
    {",+inf\r\n", BAD, OK, 1, "double"},
    {",.\r\n", BAD, BAD, 1, "double"},
    {",-.\r\n", BAD, BAD, 1, "double"},
    {",\r\n", BAD, BAD, 1, "double"},
    {",-\r\n", BAD, BAD, 1, "double"},
    {",0x10\r\n", BAD, BAD, 1, "double"},
    {",1e999\r\n", BAD, BAD, 1, "double"},
    {",-1e999\r\n", BAD, BAD, 1, "double"},
    {",1e99999999999999999999\r\n", BAD, BAD, 1, "double"},
    {",1.2.3\r\n", BAD, BAD, 1, "double"},
    {",1e\r\n", BAD, BAD, 1, "double"},
    {",1e+\r\n", BAD, BAD, 1, "double"},
    {",e5\r\n", BAD, BAD, 1, "double"},
    {",1e5.0\r\n", BAD, BAD, 1, "double"},
    {", 1\r\n", BAD, BAD, 1, "double"},
    {",1 \r\n", BAD, BAD, 1, "double"},
    {",1,5\r\n", BAD, BAD, 1, "double"},
    {",abc\r\n", BAD, BAD, 1, "double"},
    {",infinity\r\n", BAD, BAD, 1, "double"},
    {",in\r\n", BAD, BAD, 1, "double"},
    {",-nan\r\n", BAD, OK, 1, "double"},
    {",nan(x)\r\n", BAD, OK, 1, "double"},
    {",-nan(0x8000)\r\n", BAD, OK, 1, "double"},
    {",nan(\r\n", BAD, BAD, 1, "double"},
    {",nanx\r\n", BAD, BAD, 1, "double"},
    // Big numbers.
    {"(\r\n", BAD, BAD, 1, "big number"},
    {"(-\r\n", BAD, BAD, 1, "big number"},
    {"(+\r\n", BAD, BAD, 1, "big number"},
    {"(1.0\r\n", BAD, BAD, 1, "big number"},
    {"(12a\r\n", BAD, BAD, 1, "big number"},
    {"(--1\r\n", BAD, BAD, 1, "big number"},
    // Verbatim strings.
    {"=3\r\nabc\r\n", BAD, BAD, 0, "verbatim"},
    {"=0\r\n\r\n", BAD, BAD, 0, "verbatim"},
    {"=5\r\nabcde\r\n", BAD, BAD, 7, "colon"},
    // Pushes.
    {">0\r\n", BAD, BAD, 0, "push"},
    {">1\r\n:5\r\n", BAD, BAD, 4, "push"},
    {">1\r\n_\r\n", BAD, BAD, 4, "push"},
    {">1\r\n$-1\r\n", BAD, BAD, 4, "push"},
    {">1\r\n-ERR\r\n", BAD, BAD, 4, "push"},
    {">1\r\n!1\r\nE\r\n", BAD, BAD, 4, "push"},
    {">1\r\n#t\r\n", BAD, BAD, 4, "push"},
    {">1\r\n*1\r\n+x\r\n", BAD, BAD, 4, "push"},
    {">1\r\n>1\r\n+x\r\n", BAD, BAD, 4, "push"},
    // Lines.
    {"+a\n", BAD, BAD, 2, "CR"},
    {"+\n", BAD, BAD, 1, "CR"},
    {"+a\rb\r\n", BAD, BAD, 3, "LF"},
    {"-a\r\r\n", BAD, BAD, 3, "LF"},
    {"\n", BAD, BAD, 0, "0x0a"},
    {"\r\n", BAD, BAD, 0, "0x0d"},
    // Bytes that begin no value, named as they are.
    {";5\r\nhello\r\n", BAD, BAD, 0, "';'"},
    {".\r\n", BAD, BAD, 0, "'.'"},
    {"x\r\n", BAD, BAD, 0, "'x'"},
    {"PING\r\n", BAD, BAD, 0, "'P'"},
    {"\x80\r\n", BAD, BAD, 0, "0x80"},
    {"\xff", BAD, BAD, 0, "0xff"},
    {" :1\r\n", BAD, BAD, 0, "' '"},
    // Inside something, and after something whole.
    {"*2\r\n:1\r\n:01\r\n", BAD, BAD, 9, "zero"},
    {"*2\r\n$3\r\nabc\r\nZ", BAD, BAD, 13, "'Z'"},
    {"%1\r\n+k\r\n$1\r\nabc", BAD, BAD, 13, "CRLF"},
    {"|1\r\n+k\r\n+v\r\n?", BAD, BAD, 12, "'?'"},
    // Other protocols.
    {"GET / HTTP/1.1\r\nHost: x\r\n\r\n", BAD, BAD, 0, "HTTP"},
    {"POST / HTTP/1.1\r\n", BAD, BAD, 0, "HTTP"},
    {"HTTP/1.1 400 Bad Request\r\n", BAD, BAD, 0, "HTTP"},
    {"\x16\x03\x01\x02", BAD, BAD, 0, "TLS"},
    {"\x15\x03\x03", BAD, BAD, 0, "TLS"},
};

} // namespace

TEST_CASE("resp reader: what it must refuse, where, and why", "[resp][refusals]")
{
    for (const Refusal &row : k_refusals) {
        INFO(row.bytes);
        const Outcome strict = read_fed(row.bytes, {}, plain_config());
        const Outcome lenient = read_fed(row.bytes, {}, lenient_config());
        CHECK(strict.status == row.strict);
        CHECK(strict.position == row.position);
        CHECK(contains(strict.reason, row.word));
        if (row.lenient == VKP_OK) {
            CHECK(lenient.status == VKP_ERR_EMPTY);
            CHECK(lenient.frames.size() == 1);
            CHECK(lenient.reason.empty());
        } else {
            CHECK(lenient.status == row.lenient);
            CHECK(lenient.frames.empty());
            CHECK_FALSE(lenient.reason.empty());
        }
    }
}

TEST_CASE("resp reader: a refusal is the same however the input is split",
          "[resp][refusals][split]")
{
    for (const Refusal &row : k_refusals) {
        INFO(row.bytes);
        for (const vkp_resp_config &config : {plain_config(), lenient_config()}) {
            std::string example;
            const size_t differing = differing_splits(row.bytes, config, &example);
            INFO(example);
            CHECK(differing == 0);
        }
    }
}

TEST_CASE("resp reader: a zero byte is an unknown type too", "[resp][refusals]")
{
    Reader reader;
    CHECK(reader.verdict(std::string(1, '\0')) == VKP_ERR_PROTOCOL);
    CHECK(contains(reader.reason(), "0x00"));
}

TEST_CASE("resp reader: every byte that begins no type is refused at once", "[resp][refusals]")
{
    const std::string types = "+-:$*_#,(!=%~>|";
    // The first letter of a word that tells HTTP waits for the rest of the word.
    const std::string undecided = "HGPOD";
    for (int byte = 0; byte < 256; byte++) {
        INFO("byte " << byte);
        const char c = static_cast<char>(byte);
        Reader reader;
        const vkp_status verdict = reader.verdict(std::string(1, c));
        if (types.find(c) != std::string::npos) {
            CHECK(verdict == VKP_ERR_EMPTY);
        } else if (undecided.find(c) == std::string::npos) {
            CHECK(verdict == VKP_ERR_PROTOCOL);
        }
        if (types.find(c) == std::string::npos) {
            Reader more;
            CHECK(more.verdict(std::string(1, c) + "~~~~") == VKP_ERR_PROTOCOL);
            CHECK(more.position() == 0);
        }
    }
}

TEST_CASE("resp reader: an error stays until reset, whatever is fed", "[resp]")
{
    Env env;
    vkp_resp_config config = plain_config();
    config.env = &env.test.env;
    config.max_bulk_bytes = 10;
    {
        Reader reader(config);
        const vkp_value *value = nullptr;
        size_t consumed = 0;
        for (vkp_status expected : {VKP_ERR_PROTOCOL, VKP_ERR_LIMIT}) {
            CHECK(reader.reason().empty());
            CHECK(reader.feed(":1\r\n") == VKP_OK);
            CHECK(reader.next(&value) == VKP_OK);
            CHECK(reader.feed(expected == VKP_ERR_LIMIT ? "$11\r\n" : "*1\r\n?") == VKP_OK);
            CHECK(reader.next(&value) == expected);
            const std::string reason = reader.reason();
            const uint64_t position = reader.position();
            CHECK_FALSE(reason.empty());
            CHECK(position == (expected == VKP_ERR_LIMIT ? 4u : 8u));
            for (int again = 0; again < 3; again++) {
                CHECK(reader.next(&value) == expected);
                CHECK(reader.feed(":2\r\n") == expected);
                CHECK(vkp_resp_reader_scan(reader.get(), ":2\r\n", 4, &value, &consumed) ==
                      expected);
                CHECK(reader.reason() == reason);
                CHECK(reader.position() == position);
            }
            vkp_resp_reader_reset(reader.get());
        }
        CHECK(reader.next(&value) == VKP_ERR_EMPTY);
        CHECK(reader.feed(":3\r\n") == VKP_OK);
        REQUIRE(reader.next(&value) == VKP_OK);
        CHECK(value->u.integer == 3);
    }
    CHECK(env.blocks() == 0);
}

TEST_CASE("resp reader: reset forgets the buffer and the frame under way", "[resp]")
{
    for (const Example &each : k_examples) {
        const std::string bytes = each.bytes;
        for (size_t cut = 0; cut < bytes.size(); cut++) {
            Reader reader;
            const vkp_value *value = nullptr;
            REQUIRE(reader.feed(bytes.substr(0, cut)) == VKP_OK);
            REQUIRE(reader.next(&value) == VKP_ERR_EMPTY);
            vkp_resp_reader_reset(reader.get());
            REQUIRE(reader.next(&value) == VKP_ERR_EMPTY);
            REQUIRE(reader.feed("+new\r\n:x") == VKP_OK);
            REQUIRE(reader.next(&value) == VKP_OK);
            REQUIRE(tree_text(value) == "string/1(new)");
            REQUIRE(reader.next(&value) == VKP_ERR_PROTOCOL);
            REQUIRE(reader.position() == 7);
        }
    }
    // Whole values that nobody took go too.
    Reader reader;
    const vkp_value *value = nullptr;
    REQUIRE(reader.feed(":1\r\n:2\r\n") == VKP_OK);
    vkp_resp_reader_reset(reader.get());
    CHECK(reader.next(&value) == VKP_ERR_EMPTY);
}

TEST_CASE("resp reader: positions count from open, over all frames", "[resp]")
{
    for (bool by_byte : {false, true}) {
        const std::string good = repeat(":1\r\n$3\r\nabc\r\n", 1000);
        const std::string bytes = good + "*2\r\n:1\r\n?";
        const std::vector<size_t> cuts = by_byte ? every_byte(bytes) : std::vector<size_t>{};
        CHECK(read_fed(bytes, cuts, plain_config()).position == good.size() + 8);
        CHECK(read_scanned(bytes, cuts, plain_config()).position == good.size() + 8);
    }
}

TEST_CASE("resp reader: the bulk limit", "[resp][limits]")
{
    vkp_resp_config config = plain_config();
    config.max_bulk_bytes = 100;
    for (const char *mark : {"$", "!", "="}) {
        INFO(mark);
        const std::string body = "txt:" + std::string(96, 'x');
        Reader at(config);
        CHECK(at.verdict(mark + ("100\r\n" + body + "\r\n")) == VKP_OK);
        Reader above(config);
        // Refused by the header, before any of its bytes.
        CHECK(above.verdict(mark + std::string("101\r\n")) == VKP_ERR_LIMIT);
        CHECK(above.position() == 0);
        CHECK(contains(above.reason(), "101"));
        CHECK(contains(above.reason(), "100"));
    }
    Reader defaults;
    CHECK(defaults.verdict("$536870912\r\n") == VKP_ERR_EMPTY);
    vkp_resp_reader_reset(defaults.get());
    CHECK(defaults.verdict("$536870913\r\n") == VKP_ERR_LIMIT);
    vkp_resp_reader_reset(defaults.get());
    CHECK(defaults.verdict("$9223372036854775807\r\n") == VKP_ERR_LIMIT);
}

TEST_CASE("resp reader: the limit of elements counts what the wire counts", "[resp][limits]")
{
    vkp_resp_config config = plain_config();
    config.max_elements = 3;
    for (const char *mark : {"*", "~", ">", "%", "|"}) {
        INFO(mark);
        Reader at(config);
        CHECK(at.verdict(mark + std::string("3\r\n")) == VKP_ERR_EMPTY);
        Reader above(config);
        CHECK(above.verdict(mark + std::string("4\r\n")) == VKP_ERR_LIMIT);
        CHECK(above.position() == 0);
        CHECK(contains(above.reason(), "4"));
        CHECK(contains(above.reason(), "3"));
    }
    Reader nested(config);
    CHECK(nested.verdict("*3\r\n*3\r\n:1\r\n*4\r\n") == VKP_ERR_LIMIT);
    CHECK(nested.position() == 12);
    for (const char *mark : {"*", "~", ">", "%", "|"}) {
        Reader defaults;
        CHECK(defaults.verdict(mark + std::string("2147483647\r\n")) == VKP_ERR_EMPTY);
        vkp_resp_reader_reset(defaults.get());
        CHECK(defaults.verdict(mark + std::string("2147483648\r\n")) == VKP_ERR_LIMIT);
    }
}

TEST_CASE("resp reader: the line limit does not count CRLF, and needs no end of line to refuse",
          "[resp][limits]")
{
    vkp_resp_config config = plain_config();
    config.max_line_bytes = 20;
    const std::string text(20, '7');
    for (const char *mark : {"+", "-", ",", "("}) {
        INFO(mark);
        Reader at(config);
        CHECK(at.verdict(mark + text + "\r\n") == VKP_OK);
        Reader open(config);
        CHECK(open.verdict(mark + text) == VKP_ERR_EMPTY);
        Reader above(config);
        CHECK(above.verdict(mark + text + "7\r\n") == VKP_ERR_LIMIT);
        CHECK(contains(above.reason(), "20"));
        Reader endless(config);
        CHECK(endless.verdict(mark + text + "7") == VKP_ERR_LIMIT);
        std::string example;
        CHECK(differing_splits(mark + text + "7777777\r\n", config, &example) == 0);
        INFO(example);
        CHECK(differing_splits(mark + text + "\r\n", config, &example) == 0);
    }
    Reader defaults;
    CHECK(defaults.verdict("+" + std::string(65536, 'x') + "\r\n") == VKP_OK);
    CHECK(defaults.verdict("+" + std::string(65537, 'x')) == VKP_ERR_LIMIT);
}

TEST_CASE("resp reader: the limit of a whole frame", "[resp][limits]")
{
    vkp_resp_config config = plain_config();
    config.max_frame_bytes = 40;
    const struct {
        std::string bytes;
        vkp_status expected;
    } rows[] = {
        {"$33\r\n" + std::string(33, 'x') + "\r\n", VKP_OK},
        {"$34\r\n", VKP_ERR_LIMIT},
        {"*9\r\n" + repeat(":1\r\n", 9), VKP_OK},
        {"*10\r\n" + repeat(":1\r\n", 10), VKP_ERR_LIMIT},
        {"*9\r\n" + repeat(":1\r\n", 8) + ":12\r\n", VKP_ERR_LIMIT},
        {"+" + std::string(37, 'x') + "\r\n", VKP_OK},
        {"+" + std::string(38, 'x') + "\r\n", VKP_ERR_LIMIT},
        {"|1\r\n:1\r\n:2\r\n*6\r\n" + repeat(":1\r\n", 6), VKP_OK},
        {"|1\r\n:1\r\n:2\r\n*7\r\n" + repeat(":1\r\n", 7), VKP_ERR_LIMIT},
        {">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$10\r\n1234567890\r\n", VKP_ERR_LIMIT},
        {">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$9\r\n123456789\r\n", VKP_OK},
    };
    for (const auto &row : rows) {
        INFO(row.bytes);
        Reader reader(config);
        CHECK(reader.verdict(row.bytes) == row.expected);
        if (row.expected == VKP_ERR_LIMIT) {
            CHECK(contains(reader.reason(), "40"));
            CHECK(reader.position() < row.bytes.size());
        }
        std::string example;
        CHECK(differing_splits(row.bytes, config, &example) == 0);
        INFO(example);
        // It is a limit of one frame, not of all.
        if (row.expected == VKP_OK) {
            CHECK(read_fed(repeat(row.bytes, 20), {}, config).frames.size() == 20);
        }
    }
    // A frame that never ends is refused when it has grown too large, not when it is whole.
    Reader endless(config);
    CHECK(endless.verdict("*1000\r\n" + repeat("_\r\n", 11)) == VKP_ERR_LIMIT);
}

TEST_CASE("resp reader: limits say the same of a frame whatever came before it", "[resp][limits]")
{
    // A message is common enough to tempt a reader into a short cut; limits hold there too.
    const std::string message = ">3\r\n$7\r\nmessage\r\n$2\r\nc1\r\n$2\r\nhi\r\n";
    const std::string warming = "*2\r\n*2\r\n:1\r\n:2\r\n*2\r\n:1\r\n:2\r\n";
    vkp_resp_config configs[4] = {plain_config(), plain_config(), plain_config(), plain_config()};
    configs[0].max_elements = 2;
    configs[1].max_bulk_bytes = 6;
    configs[2].max_frame_bytes = warming.size();
    configs[3].max_bulk_bytes = 1;
    for (const vkp_resp_config &config : configs) {
        INFO("elements " << config.max_elements << " bulk " << config.max_bulk_bytes << " frame "
                         << config.max_frame_bytes);
        Reader cold(config);
        Reader warm(config);
        const vkp_value *value = nullptr;
        REQUIRE(warm.feed(warming) == VKP_OK);
        REQUIRE(warm.next(&value) == VKP_OK);
        CHECK(cold.verdict(message) == VKP_ERR_LIMIT);
        CHECK(warm.verdict(message) == VKP_ERR_LIMIT);
        CHECK(warm.reason() == cold.reason());
        CHECK(warm.position() == cold.position() + warming.size());
    }
}

TEST_CASE("resp reader: messages read fast are read right", "[resp][split]")
{
    // Lengths around the number of digits, payloads that look like frames, frames that almost are
    // messages; each after another one, so that every path through the reader is warm.
    std::vector<std::string> frames;
    for (size_t channel : {0u, 1u, 9u, 10u, 11u, 99u, 100u}) {
        for (size_t payload : {0u, 1u, 9u, 10u, 100u, 1000u}) {
            frames.push_back(">3\r\n" + bulk("message") + bulk(std::string(channel, 'c')) +
                             bulk(std::string(payload, '\r')));
        }
    }
    frames.push_back(">3\r\n" + bulk("message") + bulk("c") + "_\r\n");
    frames.push_back(">3\r\n" + bulk("message") + bulk("c") + "$-1\r\n");
    frames.push_back(">3\r\n" + bulk("message") + ":1\r\n:2\r\n");
    frames.push_back(">3\r\n" + bulk("message") + bulk("c") + "|0\r\n" + bulk("p"));
    frames.push_back(">3\r\n" + bulk("messagf") + bulk("c") + bulk("p"));
    frames.push_back(">2\r\n" + bulk("message") + bulk("c"));
    frames.push_back(">4\r\n" + bulk("message") + bulk("c") + bulk("p") + bulk("q"));
    frames.push_back(">3\r\n" + bulk("message") + bulk("c") + bulk(">3\r\n$7\r\nmessage\r\n"));
    std::string all;
    std::vector<std::string> expected;
    for (const std::string &frame : frames) {
        const Outcome alone = read_fed(frame, {}, plain_config());
        REQUIRE(alone.frames.size() == 1);
        expected.push_back(alone.frames[0]);
        all += frame;
    }
    const Outcome whole = read_fed(all, {}, plain_config());
    CHECK(whole.frames == expected);
    CHECK(whole.sound);
    CHECK(read_scanned(all, {}, plain_config()).same(whole));
    std::vector<size_t> thirds;
    for (size_t at = 3; at < all.size(); at += 3) {
        thirds.push_back(at);
    }
    CHECK(read_scanned(all, thirds, plain_config()).same(whole));
    CHECK(read_fed(all, every_byte(all), plain_config()).same(whole));
    const std::string warm = frames[20] + frames[21];
    for (const char *broken :
         {">3\r\n$7\r\nmessage\r\n$01\r\nc\r\n$1\r\np\r\n",
          ">3\r\n$7\r\nmessage\r\n$1\r\ncX\n$1\r\np\r\n",
          ">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\npXY", ">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\npp",
          ">3\r\n$7\r\nmessage\r\n$999999999\r\nc\r\n", ">3\r\n$7\r\nmessageX\n$1\r\nc\r\n"}) {
        INFO(broken);
        const Outcome cold_outcome = read_fed(broken, {}, plain_config());
        const Outcome warm_outcome = read_fed(warm + broken, {}, plain_config());
        CHECK(cold_outcome.status != VKP_ERR_EMPTY);
        CHECK(warm_outcome.status == cold_outcome.status);
        CHECK(warm_outcome.reason == cold_outcome.reason);
        CHECK(warm_outcome.position == cold_outcome.position + warm.size());
    }
}

TEST_CASE("resp reader: nesting to the limit and one deeper", "[resp][limits]")
{
    const struct {
        const char *open;
        const char *name;
    } kinds[] = {
        {"*1\r\n", "array"},   {"~1\r\n", "set"},        {"%1\r\n+k\r\n", "map value"},
        {"%1\r\n", "map key"}, {">2\r\n+k\r\n", "push"}, {"|1\r\n+k\r\n", "attribute"},
    };
    for (const auto &kind : kinds) {
        INFO(kind.name);
        Reader at;
        CHECK(at.verdict(repeat(kind.open, 128) + ":1\r\n") != VKP_ERR_LIMIT);
        Reader above;
        CHECK(above.verdict(repeat(kind.open, 129)) == VKP_ERR_LIMIT);
        CHECK(above.position() == 128 * std::strlen(kind.open));
        CHECK(contains(above.reason(), "128"));
    }
    Reader at;
    CHECK(at.verdict(repeat("*1\r\n", 128) + ":1\r\n") == VKP_OK);
    Reader empty;
    CHECK(empty.verdict(repeat("*1\r\n", 127) + "*0\r\n") == VKP_OK);
    CHECK(empty.verdict(repeat("*1\r\n", 128) + "*0\r\n") == VKP_ERR_LIMIT);
    // Siblings do not add up.
    Reader wide;
    CHECK(wide.verdict("*300\r\n" + repeat("*1\r\n:1\r\n", 300)) == VKP_OK);

    vkp_resp_config config = plain_config();
    config.max_depth = 1;
    Reader flat(config);
    CHECK(flat.verdict("*2\r\n:1\r\n:2\r\n") == VKP_OK);
    CHECK(flat.verdict("*1\r\n*0\r\n") == VKP_ERR_LIMIT);
}

TEST_CASE("resp reader: the deepest tree there may be is read and freed without recursion",
          "[resp][limits]")
{
    Env env;
    vkp_resp_config config = plain_config();
    config.max_depth = 65000;
    config.env = &env.test.env;
    {
        Reader reader(config);
        const vkp_value *value = nullptr;
        REQUIRE(reader.feed(repeat("*1\r\n", 65000) + ":7\r\n") == VKP_OK);
        REQUIRE(reader.next(&value) == VKP_OK);
        CHECK(value->span == 65001);
        size_t depth = 0;
        for (const vkp_value *child = value; child != nullptr; child = vkp_value_get_first(child)) {
            depth++;
        }
        CHECK(depth == 65001);
        CHECK(reader.verdict(repeat("*1\r\n", 65001)) == VKP_ERR_LIMIT);
    }
    CHECK(env.blocks() == 0);
}

TEST_CASE("resp reader: a header allocates nothing for what it announces", "[resp][limits]")
{
    for (const char *header : {"*4294967295\r\n", "*2147483647\r\n", "~2147483647\r\n",
                               "%2147483647\r\n", ">2147483647\r\n", "|2147483647\r\n",
                               "$536870912\r\n", "!536870912\r\n", "=536870912\r\n"}) {
        INFO(header);
        Env env;
        vkp_resp_config config = plain_config();
        config.env = &env.test.env;
        {
            Reader reader(config);
            const size_t before = vkp_test_env_live_bytes(&env.test);
            const vkp_status status = reader.verdict(header);
            CHECK((status == VKP_ERR_EMPTY || status == VKP_ERR_LIMIT));
            CHECK(vkp_test_env_peak_bytes(&env.test) - before <= 2048);
        }
        CHECK(env.blocks() == 0);
    }
}

TEST_CASE("resp reader: memory grows with the bytes received, not with hostile headers",
          "[resp][limits]")
{
    // The densest input: a value in three bytes, an aggregate in four, announcing the most.
    for (const char *unit : {"_\r\n", "*0\r\n", "|0\r\n"}) {
        INFO(unit);
        Env env;
        vkp_resp_config config = plain_config();
        config.env = &env.test.env;
        {
            Reader reader(config);
            const std::string bytes = "*2147483647\r\n" + repeat(unit, 20000);
            CHECK(reader.verdict(bytes) == VKP_ERR_EMPTY);
            CHECK(vkp_test_env_peak_bytes(&env.test) <= 64 * bytes.size());
        }
        CHECK(env.blocks() == 0);
    }
    // Headers upon headers.
    Env env;
    vkp_resp_config config = plain_config();
    config.env = &env.test.env;
    {
        Reader reader(config);
        CHECK(reader.verdict(repeat("*2147483647\r\n", 128)) == VKP_ERR_EMPTY);
        CHECK(vkp_test_env_peak_bytes(&env.test) <= 64 * 1024);
    }
}

TEST_CASE("resp reader: what the views show stays until the next call, and no copy is needed",
          "[resp]")
{
    Reader reader;
    const std::string bytes = "*2\r\n$3\r\nabc\r\n+def\r\n$3\r\nnew\r\n";
    const vkp_value *value = nullptr;
    size_t consumed = 0;
    REQUIRE(vkp_resp_reader_scan(reader.get(), bytes.data(), bytes.size(), &value, &consumed) ==
            VKP_OK);
    CHECK(consumed == 19);
    const vkp_value *first = vkp_value_get_first(value);
    const vkp_value *second = vkp_value_get_next(value, first);
    CHECK(first->u.str == bytes.data() + 8);
    CHECK(second->u.str == bytes.data() + 14);
    REQUIRE(vkp_resp_reader_scan(reader.get(), bytes.data() + consumed, bytes.size() - consumed,
                                 &value, &consumed) == VKP_OK);
    CHECK(consumed == 9);
    CHECK(value->u.str == bytes.data() + 23);
}

TEST_CASE("resp reader: scan leaves its outputs alone when it has nothing to give", "[resp]")
{
    Reader reader;
    const vkp_value *value = nullptr;
    size_t consumed = 99;
    CHECK(vkp_resp_reader_scan(reader.get(), "*1\r\n", 4, &value, &consumed) == VKP_ERR_EMPTY);
    CHECK(vkp_resp_reader_scan(reader.get(), "*1\r\n?", 5, &value, &consumed) == VKP_ERR_PROTOCOL);
    CHECK(value == nullptr);
    CHECK(consumed == 99);
}

TEST_CASE("resp reader: attributes count for nobody and may repeat", "[resp]")
{
    Reader reader;
    const vkp_value *value = nullptr;
    REQUIRE(reader.feed("*2\r\n|1\r\n+a\r\n:1\r\n|1\r\n+b\r\n:2\r\n:10\r\n:20\r\n"
                        "|1\r\n+c\r\n:3\r\n+top\r\n+bare\r\n") == VKP_OK);
    REQUIRE(reader.next(&value) == VKP_OK);
    CHECK(value->len == 2);
    CHECK(value->attributes == 0);
    const vkp_value *first = vkp_value_get_first(value);
    REQUIRE(first != nullptr);
    CHECK(first->u.integer == 10);
    const vkp_value *second = vkp_value_get_next(value, first);
    REQUIRE(second != nullptr);
    CHECK(second->u.integer == 20);
    CHECK(second->attributes == 0);
    CHECK(vkp_value_get_next(value, second) == nullptr);
    // The nearest attribute annotates the value, the one before it is found from there.
    const vkp_value *near = first - first->attributes;
    CHECK(near->type == VKP_RESP_ATTRIBUTE);
    CHECK(near->len == 2);
    CHECK(vkp_value_is_text(vkp_value_get_first(near), vkp_str_of("b")));
    const vkp_value *far = near - near->attributes;
    CHECK(far->type == VKP_RESP_ATTRIBUTE);
    CHECK(vkp_value_is_text(vkp_value_get_first(far), vkp_str_of("a")));
    CHECK(far->attributes == 0);

    REQUIRE(reader.next(&value) == VKP_OK);
    CHECK(vkp_value_is_text(value, vkp_str_of("top")));
    REQUIRE(value->attributes != 0);
    CHECK(vkp_value_is_text(vkp_value_get_first(value - value->attributes), vkp_str_of("c")));
    REQUIRE(reader.next(&value) == VKP_OK);
    CHECK(vkp_value_is_text(value, vkp_str_of("bare")));
    CHECK(value->attributes == 0);

    // An attribute alone is not a value yet.
    CHECK(reader.verdict("|1\r\n+a\r\n:1\r\n") == VKP_ERR_EMPTY);
    CHECK(reader.verdict("_\r\n") == VKP_OK);
}

TEST_CASE("resp reader: the kind of a push comes first, an attribute before it is refused",
          "[resp]")
{
    Reader reader;
    CHECK(reader.verdict(">2\r\n|1\r\n+a\r\n:1\r\n+kind\r\n:5\r\n") == VKP_ERR_PROTOCOL);
    CHECK(reader.position() == 4);
    CHECK(contains(reader.reason(), "push"));
    // Behind the kind they may stand as anywhere.
    const Outcome outcome = read_fed(">2\r\n+kind\r\n|1\r\n+a\r\n:1\r\n:5\r\n", {}, plain_config());
    CHECK(outcome.frames ==
          std::vector<std::string>{
              "push[2]+6 string/1(kind) attr[2]+3 string/1(a) integer(1) integer(5)@3"});
}

TEST_CASE("value: walking, text and comparison", "[resp]")
{
    Reader reader;
    const vkp_value *value = nullptr;
    REQUIRE(reader.feed("%2\r\n+Key\r\n*2\r\n:1\r\n:2\r\n-ERR x\r\n_\r\n"
                        "*5\r\n:7\r\n(12\r\n,1.5\r\n#t\r\n*0\r\n") == VKP_OK);
    REQUIRE(reader.next(&value) == VKP_OK);
    const vkp_value *key = vkp_value_get_first(value);
    const vkp_value *list = vkp_value_get_next(value, key);
    const vkp_value *error = vkp_value_get_next(value, list);
    const vkp_value *null = vkp_value_get_next(value, error);
    REQUIRE(null != nullptr);
    CHECK(vkp_value_get_next(value, null) == nullptr);
    CHECK(list->len == 2);
    CHECK(error->type == VKP_RESP_ERROR);
    CHECK(null->type == VKP_RESP_NULL);
    CHECK(vkp_value_get_first(key) == nullptr);
    CHECK(vkp_value_get_first(null) == nullptr);

    CHECK(vkp_test_view(vkp_value_get_str(key)) == "Key");
    CHECK(vkp_test_view(vkp_value_get_str(error)) == "ERR x");
    CHECK(vkp_value_get_str(list).len == 0);
    CHECK(vkp_value_get_str(null).len == 0);
    CHECK(vkp_value_get_str(nullptr).len == 0);
    CHECK(vkp_value_is_text(key, vkp_str_of("key")));
    CHECK(vkp_value_is_text(key, vkp_str_of("KEY")));
    CHECK_FALSE(vkp_value_is_text(key, vkp_str_of("ke")));
    CHECK_FALSE(vkp_value_is_text(key, vkp_str_of("keyy")));
    CHECK_FALSE(vkp_value_is_text(key, vkp_str_of("")));
    CHECK(vkp_value_is_text(error, vkp_str_of("err X")));
    CHECK_FALSE(vkp_value_is_text(null, vkp_str_of("")));
    CHECK_FALSE(vkp_value_is_text(list, vkp_str_of("")));

    REQUIRE(reader.next(&value) == VKP_OK);
    const vkp_value *integer = vkp_value_get_first(value);
    const vkp_value *bignum = vkp_value_get_next(value, integer);
    const vkp_value *real = vkp_value_get_next(value, bignum);
    const vkp_value *boolean = vkp_value_get_next(value, real);
    const vkp_value *empty = vkp_value_get_next(value, boolean);
    REQUIRE(empty != nullptr);
    CHECK(vkp_value_get_first(empty) == nullptr);
    CHECK(vkp_value_get_str(integer).len == 0);
    CHECK(vkp_value_get_str(boolean).len == 0);
    CHECK(vkp_test_view(vkp_value_get_str(bignum)) == "12");
    CHECK(vkp_test_view(vkp_value_get_str(real)) == "1.5");
    CHECK_FALSE(vkp_value_is_text(bignum, vkp_str_of("12")));
    CHECK_FALSE(vkp_value_is_text(real, vkp_str_of("1.5")));
    CHECK(vkp_value_get_double(integer) == 7.0);
    CHECK(vkp_value_get_double(real) == 1.5);
    CHECK(vkp_value_get_double(bignum) == 0.0);
    CHECK(vkp_value_get_double(boolean) == 0.0);
    CHECK(vkp_value_get_double(empty) == 0.0);
    CHECK(vkp_value_get_double(value) == 0.0);
}

TEST_CASE("value: a text with zero bytes is compared by its length", "[resp]")
{
    Reader reader;
    const vkp_value *value = nullptr;
    REQUIRE(reader.feed(std::string("$3\r\na\0b\r\n", 9)) == VKP_OK);
    REQUIRE(reader.next(&value) == VKP_OK);
    CHECK(value->len == 3);
    CHECK_FALSE(vkp_value_is_text(value, vkp_str_of("a")));
}

namespace {

// What the reader makes of a double's digits; NaN when it refuses them.
double read_double(const std::string &digits, bool lenient = false)
{
    Reader reader(lenient ? lenient_config() : plain_config());
    const vkp_value *value = nullptr;
    if (reader.feed("," + digits + "\r\n") != VKP_OK || reader.next(&value) != VKP_OK) {
        return std::nan("");
    }
    return vkp_value_get_double(value);
}

const char *const k_doubles[] = {
    "0",
    "-0",
    "1",
    "-1",
    "+1",
    "10",
    "3.14",
    "-3.14",
    "+3.14",
    "0.5",
    "1e5",
    "1E5",
    "1e+5",
    "1e-5",
    "1.5e3",
    "-1.5E-3",
    "123456789012345678",
    "0.1",
    "0.10000000000000001",
    "1.7976931348623157e308",
    "-1.7976931348623157e+308",
    "2.2250738585072014e-308",
    "4.9406564584124654e-324",
    "1e-400",
    "-1e-400",
    "9007199254740993",
    "9007199254740992.5",
    "0.30000000000000004",
    "179769313486231570000000000000000",
    "1e0",
    "0e0",
    "0e999999",
    "0.0e-5",
    "5e-324",
    "2.4703282292062327e-324",
    "1e23",
    "8.5e22",
    "123e-7",
    "1000000000000000000000e-21",
};

// Middle between two doubles, with and without a digit far behind that decides.
std::string halfway(const std::string &tail)
{
    // 2^-1074 / 2, all of its digits.
    char digits[1200];
    std::snprintf(digits, sizeof digits, "%.1075f", std::ldexp(1.0, -1074));
    std::string text = digits;
    // Halve the decimal digits by hand: libm has no double for the result.
    std::string half;
    int carry = 0;
    for (char c : text + "0") {
        if (c == '.') {
            half += c;
            continue;
        }
        const int current = carry * 10 + (c - '0');
        half += static_cast<char>('0' + current / 2);
        carry = current % 2;
    }
    return half + tail;
}

} // namespace

TEST_CASE("double: every spelling has the value that the standard library gives it",
          "[resp][double]")
{
    for (const char *digits : k_doubles) {
        INFO(digits);
        const double expected = std::strtod(digits, nullptr);
        const double got = read_double(digits);
        CHECK(std::memcmp(&got, &expected, sizeof got) == 0);
    }
    CHECK(read_double("inf") == std::strtod("inf", nullptr));
    CHECK(read_double("-inf") == std::strtod("-inf", nullptr));
    CHECK(std::isnan(read_double("nan")));
    CHECK(read_double("5.", true) == 5.0);
    CHECK(read_double(".5", true) == 0.5);
    CHECK(read_double("-.5e1", true) == -5.0);
    CHECK(read_double("5.e1", true) == 50.0);
    for (const char *digits : {"nan", "-nan", "nan(0x1)", "-nan()"}) {
        Reader reader(lenient_config());
        const vkp_value *value = nullptr;
        REQUIRE(reader.feed("," + std::string(digits) + "\r\n") == VKP_OK);
        REQUIRE(reader.next(&value) == VKP_OK);
        CHECK(std::isnan(vkp_value_get_double(value)));
    }
}

TEST_CASE("double: random doubles survive seventeen digits", "[resp][double]")
{
    std::mt19937_64 random(7);
    size_t wrong = 0;
    for (int i = 0; i < 20000; i++) {
        const uint64_t bits = random();
        double number;
        std::memcpy(&number, &bits, sizeof number);
        if (!std::isfinite(number)) {
            continue;
        }
        char digits[64];
        std::snprintf(digits, sizeof digits, "%.17g", number);
        const double got = read_double(digits);
        wrong += std::memcmp(&got, &number, sizeof got) != 0;
    }
    CHECK(wrong == 0);
}

TEST_CASE("double: long mantissas are not cut where it matters", "[resp][double]")
{
    const std::string rows[] = {
        std::string(300, '1'),
        std::string(1000, '1') + "e-1000",
        std::string(500, '0') + "1.5",
        "-" + std::string(500, '0') + "1.5",
        "0." + std::string(500, '0') + "15e501",
        "0." + std::string(320, '0') + "15",
        "1" + std::string(600, '0') + "e-600",
        "1." + std::string(600, '0') + "1",
        "1." + std::string(600, '9'),
        "0." + std::string(5000, '9') + "e10",
        "1" + std::string(10000, '0') + "e-10000",
        // Between two neighbours; the last digit decides, however far behind it stands.
        "9007199254740993." + std::string(450, '0'),
        "9007199254740993." + std::string(450, '0') + "1",
        halfway(""),
        halfway("1"),
        halfway(std::string(300, '0') + "1"),
    };
    for (const std::string &digits : rows) {
        INFO(digits.substr(0, 40) << "... of " << digits.size());
        const double expected = std::strtod(digits.c_str(), nullptr);
        const double got = read_double(digits);
        INFO(got << " " << expected);
        CHECK(std::memcmp(&got, &expected, sizeof got) == 0);
    }
}

namespace {

// The same doubles, read and written, as under the C locale.
void check_doubles_under(const NumericLocale &locale)
{
    char half[16];
    std::snprintf(half, sizeof half, "%.1f", 0.5);
    CHECK((std::string(half) != "0.5") == locale.active);
    CHECK(read_double("3.25") == 3.25);
    CHECK(read_double("-0.5") == -0.5);
    CHECK(read_double("1.5e3") == 1500.0);
    CHECK(read_double("1000000") == 1000000.0);
    CHECK(read_double("1.7976931348623157e308") > 1e308);
    CHECK(std::isnan(read_double("3,25")));
    vkp_resp_writer writer;
    vkp_bytes bytes = VKP_ZERO;
    vkp_resp_writer_init(&writer, nullptr);
    vkp_resp_put_double(&writer, 0.5);
    REQUIRE(vkp_resp_writer_take(&writer, &bytes) == VKP_OK);
    CHECK(std::string(reinterpret_cast<const char *>(bytes.data), bytes.len) == ",0.5\r\n");
    vkp_bytes_unref(&bytes);
}

} // namespace

TEST_CASE("double: the locale's decimal point makes no difference", "[resp][double]")
{
    const NumericLocale locale(",", ',',
                               {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "nl_NL.UTF-8"});
    if (!locale.active) {
        WARN("no locale with a decimal comma here: checked in the C locale only");
    }
    check_doubles_under(locale);
}

TEST_CASE("double: nor does a decimal point of several bytes", "[resp][double]")
{
    const NumericLocale locale("\xd9\xab", 0x66b, {"ps_AF.UTF-8", "fa_IR.UTF-8", "ps_AF", "fa_IR"});
    if (!locale.active) {
        WARN("no locale with a wide decimal point here: checked in the C locale only");
    }
    check_doubles_under(locale);
}

TEST_CASE("resp reader: memory may fail at every allocation; the reader goes on", "[resp][faults]")
{
    std::string bytes;
    for (const Example &each : k_examples) {
        bytes += each.bytes;
    }
    bytes += repeat("*1\r\n", 100) + ":1\r\n*200\r\n" + repeat("+element\r\n", 200);
    const Outcome expected = read_fed(bytes, {}, plain_config());
    Env env;
    vkp_resp_config config = plain_config();
    config.env = &env.test.env;
    uint64_t calls = 0;
    for (uint64_t k = 0; k <= calls; k++) {
        for (vkp_test_fault kind :
             {VKP_TEST_FAULT_ONCE, VKP_TEST_FAULT_FROM, VKP_TEST_FAULT_EVERY}) {
            INFO("k " << k << " kind " << kind);
            const uint64_t before = vkp_test_env_calls(&env.test);
            vkp_resp_reader *reader = nullptr;
            size_t refused = 0;
            Outcome outcome;
            vkp_status status = VKP_OK;
            if (k > 0) {
                vkp_test_env_fault(&env.test, kind, k);
            }
            // The caller's way: on NOMEM make room (here: end the fault) and try the same again.
            const auto relieve = [&] {
                refused++;
                vkp_test_env_fault(&env.test, VKP_TEST_FAULT_NONE, 0);
            };
            while ((status = vkp_resp_reader_open(&config, &reader)) == VKP_ERR_NOMEM) {
                relieve();
            }
            REQUIRE(status == VKP_OK);
            for (size_t from = 0; from < bytes.size(); from += 50) {
                const std::string piece = bytes.substr(from, 50);
                while ((status = vkp_resp_reader_feed(reader, piece.data(), piece.size())) ==
                       VKP_ERR_NOMEM) {
                    relieve();
                }
                REQUIRE(status == VKP_OK);
                const vkp_value *value = nullptr;
                do {
                    status = vkp_resp_reader_next(reader, &value);
                    if (status == VKP_OK) {
                        note(outcome, value);
                    } else if (status == VKP_ERR_NOMEM) {
                        CHECK(std::string(vkp_resp_reader_get_error(reader, nullptr)).empty());
                        relieve();
                    }
                } while (status == VKP_OK || status == VKP_ERR_NOMEM);
                REQUIRE(status == VKP_ERR_EMPTY);
            }
            vkp_test_env_fault(&env.test, VKP_TEST_FAULT_NONE, 0);
            finish(outcome, reader, status);
            vkp_resp_reader_unref(reader);
            CHECK(outcome.same(expected));
            CHECK(refused == (k > 0 ? 1 : 0));
            CHECK(env.blocks() == 0);
            if (k == 0) {
                calls = vkp_test_env_calls(&env.test) - before;
                REQUIRE(calls > 5);
            }
        }
    }
}

TEST_CASE("resp reader: scan after NOMEM goes on where it was", "[resp][faults]")
{
    const std::string bytes = repeat("*1\r\n", 60) + "*300\r\n" + repeat("+element\r\n", 300);
    const Outcome expected = read_fed(bytes, {}, plain_config());
    Env env;
    vkp_resp_config config = plain_config();
    config.env = &env.test.env;
    bool met = true;
    for (uint64_t k = 1; met; k++) {
        INFO("k " << k);
        Reader reader(config);
        const vkp_value *value = nullptr;
        size_t consumed = 0;
        vkp_test_env_fault(&env.test, VKP_TEST_FAULT_ONCE, k);
        vkp_status status =
            vkp_resp_reader_scan(reader.get(), bytes.data(), bytes.size(), &value, &consumed);
        vkp_test_env_fault(&env.test, VKP_TEST_FAULT_NONE, 0);
        met = status == VKP_ERR_NOMEM;
        if (met) {
            CHECK(consumed == 0);
            status =
                vkp_resp_reader_scan(reader.get(), bytes.data(), bytes.size(), &value, &consumed);
        }
        REQUIRE(status == VKP_OK);
        CHECK(consumed == bytes.size());
        CHECK(tree_text(value) == expected.frames[0]);
        CHECK((met || k > 5));
    }
}

TEST_CASE("frame_len: the length of the first whole frame, as the reader has it", "[resp]")
{
    for (const Example &each : k_examples) {
        INFO(each.bytes);
        const std::string bytes = each.bytes;
        const auto length = [](const std::string &text) {
            // Of the exact size: a byte past the end is caught by a sanitizer.
            const std::vector<uint8_t> copy(text.begin(), text.end());
            return vkp_resp_get_frame_len(copy.data(), copy.size());
        };
        CHECK(length(bytes) == bytes.size());
        CHECK(length(bytes + ":1\r\n") == bytes.size());
        CHECK(length(bytes + "?") == bytes.size());
        for (size_t cut = 0; cut < bytes.size(); cut++) {
            REQUIRE(length(bytes.substr(0, cut)) == 0);
        }
    }
}

TEST_CASE("frame_len: nothing, and headers of frames that never come", "[resp]")
{
    const auto length = [](const std::string &text) {
        const std::vector<uint8_t> copy(text.begin(), text.end());
        return vkp_resp_get_frame_len(copy.data(), copy.size());
    };
    CHECK(vkp_resp_get_frame_len(nullptr, 0) == 0);
    CHECK(length("*2147483647\r\n:1\r\n") == 0);
    CHECK(length("%2147483647\r\n:1\r\n") == 0);
    CHECK(length("$536870912\r\nabc\r\n") == 0);
    CHECK(length("|1\r\n+a\r\n+b\r\n") == 0);
}

TEST_CASE("resp reader: one reader takes a hundred thousand frames without growing", "[resp]")
{
    Env env;
    vkp_resp_config config = plain_config();
    config.env = &env.test.env;
    {
        Reader reader(config);
        const std::string frame =
            ">3\r\n$7\r\nmessage\r\n$2\r\nc1\r\n$2\r\nhi\r\n*2\r\n:1\r\n:2\r\n";
        const vkp_value *value = nullptr;
        size_t frames = 0;
        size_t settled = 0;
        for (int i = 0; i < 50000; i++) {
            REQUIRE(reader.feed(frame) == VKP_OK);
            while (reader.next(&value) == VKP_OK) {
                frames++;
            }
            if (i == 100) {
                settled = vkp_test_env_live_bytes(&env.test);
            }
        }
        CHECK(frames == 100000);
        CHECK(vkp_test_env_live_bytes(&env.test) == settled);
    }
    CHECK(env.blocks() == 0);
}

TEST_CASE("resp reader: lenient, infinities have their sign")
{
    const std::vector<std::pair<std::string, double>> rows = {
        {",inf\r\n", HUGE_VAL}, {",+inf\r\n", HUGE_VAL}, {",-inf\r\n", -HUGE_VAL}};
    for (const auto &row : rows) {
        const vkp_resp_config config = lenient_config();
        vkp_resp_reader *reader = nullptr;
        const vkp_value *value = nullptr;
        REQUIRE(vkp_resp_reader_open(&config, &reader) == VKP_OK);
        REQUIRE(vkp_resp_reader_feed(reader, row.first.data(), row.first.size()) == VKP_OK);
        REQUIRE(vkp_resp_reader_next(reader, &value) == VKP_OK);
        CHECK(vkp_value_get_double(value) == row.second);
        vkp_resp_reader_unref(reader);
    }
}

// ---------------------------------------------------------------------------------------------
// Streamed types

namespace {

vkp_resp_config streamed_config()
{
    vkp_resp_config config = VKP_ZERO;
    config.streamed = true;
    return config;
}

struct Pair {
    const char *streamed;
    const char *counted;
};

const Pair k_streamed[] = {
    {"$?\r\n;4\r\nHell\r\n;1\r\no\r\n;0\r\n", "$5\r\nHello\r\n"},
    {"$?\r\n;0\r\n", "$0\r\n\r\n"},
    {"$?\r\n;4\r\n\r\n;0\r\n;0\r\n", "$4\r\n\r\n;0\r\n"},
    {"$?\r\n;3\r\n.\r\n\r\n;0\r\n", "$3\r\n.\r\n\r\n"},
    {"$?\r\n;12\r\nabcdefghijkl\r\n;2\r\n\r\n\r\n;0\r\n", "$14\r\nabcdefghijkl\r\n\r\n"},
    {"*?\r\n.\r\n", "*0\r\n"},
    {"~?\r\n.\r\n", "~0\r\n"},
    {"%?\r\n.\r\n", "%0\r\n"},
    {"*?\r\n:1\r\n.\r\n", "*1\r\n:1\r\n"},
    {"*?\r\n:1\r\n_\r\n#t\r\n,1.5\r\n(12\r\n+a\r\n-b\r\n$1\r\nc\r\n!1\r\nd\r\n=5\r\ntxt:e\r\n.\r\n",
     "*10\r\n:1\r\n_\r\n#t\r\n,1.5\r\n(12\r\n+a\r\n-b\r\n$1\r\nc\r\n!1\r\nd\r\n=5\r\ntxt:e\r\n"},
    {"~?\r\n+a\r\n$-1\r\n*-1\r\n.\r\n", "~3\r\n+a\r\n$-1\r\n*-1\r\n"},
    {"%?\r\n+a\r\n:1\r\n+b\r\n:2\r\n.\r\n", "%2\r\n+a\r\n:1\r\n+b\r\n:2\r\n"},
    // Nested, in each other and in counted ones, at the start, in the midst and at the end.
    {"*?\r\n*?\r\n*?\r\n.\r\n.\r\n.\r\n", "*1\r\n*1\r\n*0\r\n"},
    {"*?\r\n*?\r\n:1\r\n.\r\n*2\r\n:2\r\n:3\r\n*0\r\n.\r\n",
     "*3\r\n*1\r\n:1\r\n*2\r\n:2\r\n:3\r\n*0\r\n"},
    {"*2\r\n*?\r\n*2\r\n~?\r\n:1\r\n.\r\n:2\r\n.\r\n:3\r\n",
     "*2\r\n*1\r\n*2\r\n~1\r\n:1\r\n:2\r\n:3\r\n"},
    {"%?\r\n$?\r\n;1\r\nk\r\n;0\r\n%?\r\n*?\r\n.\r\n$?\r\n;1\r\nv\r\n;1\r\nw\r\n;0\r\n.\r\n.\r\n",
     "%1\r\n$1\r\nk\r\n%1\r\n*0\r\n$2\r\nvw\r\n"},
    {"*3\r\n$?\r\n;1\r\na\r\n;0\r\n$?\r\n;0\r\n$?\r\n;1\r\nb\r\n;1\r\nc\r\n;0\r\n",
     "*3\r\n$1\r\na\r\n$0\r\n\r\n$2\r\nbc\r\n"},
    // Attributes are counted, what they hold and what they stand before may be streamed.
    {"|1\r\n+k\r\n*?\r\n.\r\n$?\r\n;1\r\na\r\n;0\r\n", "|1\r\n+k\r\n*0\r\n$1\r\na\r\n"},
    {"*?\r\n|1\r\n+k\r\n+v\r\n:1\r\n|0\r\n*?\r\n.\r\n.\r\n",
     "*2\r\n|1\r\n+k\r\n+v\r\n:1\r\n|0\r\n*0\r\n"},
    // Pushes are counted, what they hold may be streamed, their kind too.
    {">3\r\n$7\r\nmessage\r\n$?\r\n;1\r\nc\r\n;0\r\n$?\r\n;1\r\nh\r\n;1\r\ni\r\n;0\r\n",
     ">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$2\r\nhi\r\n"},
    {">2\r\n$?\r\n;3\r\ninv\r\n;7\r\nalidate\r\n;0\r\n*?\r\n$?\r\n;1\r\nk\r\n;0\r\n.\r\n",
     ">2\r\n$10\r\ninvalidate\r\n*1\r\n$1\r\nk\r\n"},
    {"*?\r\n>3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$?\r\n;1\r\nm\r\n;0\r\n:1\r\n.\r\n",
     "*1\r\n>3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nm\r\n:1\r\n"},
    {"*2\r\n*?\r\n.\r\n>3\r\n$?\r\n;4\r\nmess\r\n;3\r\nage\r\n;0\r\n+c\r\n*?\r\n:1\r\n.\r\n:2\r\n",
     "*2\r\n*0\r\n>3\r\n$7\r\nmessage\r\n+c\r\n*1\r\n:1\r\n:2\r\n"},
    {"*2\r\n>1\r\n$?\r\n;7\r\nmessage\r\n;15\r\n-of-the-weather\r\n;0\r\n:2\r\n",
     "*2\r\n>1\r\n$22\r\nmessage-of-the-weather\r\n:2\r\n"},
    {"*1\r\n>1\r\n$?\r\n;9\r\ntracking-\r\n;12\r\nredir-broken\r\n;0\r\n:2\r\n",
     "*1\r\n>1\r\n$21\r\ntracking-redir-broken\r\n:2\r\n"},
    {"*2\r\n>1\r\n$?\r\n;21\r\ntracking-redir-broken\r\n;4\r\n!!!!\r\n;0\r\n:2\r\n",
     "*2\r\n>1\r\n$25\r\ntracking-redir-broken!!!!\r\n:2\r\n"},
    {"*?\r\n>3\r\n$9\r\nsubscribe\r\n+c\r\n:1\r\n.\r\n",
     "*1\r\n>3\r\n$9\r\nsubscribe\r\n+c\r\n:1\r\n"},
};

size_t frame_len(const std::string &text)
{
    // Of the exact size: a byte past the end is caught by a sanitizer.
    const std::vector<uint8_t> copy(text.begin(), text.end());
    return vkp_resp_get_frame_len(copy.data(), copy.size());
}

// The value written, by the writer and as text: in RESP2, in RESP3, for people.
std::string rewritten(const std::string &bytes, const vkp_resp_config &config)
{
    Reader reader(config);
    const vkp_value *value = nullptr;
    REQUIRE(reader.feed(bytes) == VKP_OK);
    REQUIRE(reader.next(&value) == VKP_OK);
    std::string out;
    for (int protocol : {2, 3}) {
        vkp_resp_writer writer;
        vkp_bytes written = VKP_ZERO;
        vkp_resp_writer_init(&writer, nullptr);
        vkp_resp_put_value(&writer, value, protocol);
        REQUIRE(vkp_resp_writer_take(&writer, &written) == VKP_OK);
        out += std::string(reinterpret_cast<const char *>(written.data), written.len) + "|";
        vkp_bytes_unref(&written);
    }
    std::vector<char> text(vkp_value_get_text(value, nullptr, 0) + 1);
    (void)vkp_value_get_text(value, text.data(), text.size());
    return out + text.data();
}

void check_streamed(const std::string &streamed, const std::string &counted)
{
    INFO(streamed);
    const Outcome expected = read_fed(counted, {}, plain_config());
    REQUIRE(expected.frames.size() == 1);
    const Outcome whole = read_fed(streamed, {}, streamed_config());
    REQUIRE(whole.frames == expected.frames);
    REQUIRE(whole.status == VKP_ERR_EMPTY);
    REQUIRE(whole.sound);
    REQUIRE(read_fed(streamed, every_byte(streamed), streamed_config()).same(whole));
    REQUIRE(read_scanned(streamed, every_byte(streamed), streamed_config()).same(whole));
    REQUIRE(rewritten(streamed, streamed_config()) == rewritten(counted, plain_config()));
    REQUIRE(frame_len(streamed) == streamed.size());
}

} // namespace

TEST_CASE("streamed: the values are those of the counted forms", "[resp][streamed]")
{
    for (const Pair &pair : k_streamed) {
        check_streamed(pair.streamed, pair.counted);
    }
}

TEST_CASE("streamed: the result is the same however the input is split", "[resp][streamed][split]")
{
    std::string all;
    for (const Pair &pair : k_streamed) {
        INFO(pair.streamed);
        std::string example;
        const size_t differing = differing_splits(pair.streamed, streamed_config(), &example);
        INFO(example);
        CHECK(differing == 0);
        all += pair.streamed;
        all += pair.counted; // counted ones are read with the flag too
    }
    const Outcome whole = read_fed(all, {}, streamed_config());
    CHECK(whole.frames.size() == 2 * sizeof k_streamed / sizeof k_streamed[0]);
    CHECK(read_fed(all, every_byte(all), streamed_config()).same(whole));
    CHECK(read_scanned(all, every_byte(all), streamed_config()).same(whole));
}

TEST_CASE("streamed: nothing behind the last byte is needed, and nothing less is enough",
          "[resp][streamed][split]")
{
    for (const Pair &pair : k_streamed) {
        const std::string bytes = pair.streamed;
        Reader reader(streamed_config());
        const vkp_value *value = nullptr;
        for (size_t i = 0; i < bytes.size(); i++) {
            INFO(bytes << " at " << i);
            REQUIRE(reader.next(&value) == VKP_ERR_EMPTY);
            REQUIRE(reader.feed(bytes.substr(i, 1)) == VKP_OK);
            REQUIRE(frame_len(bytes.substr(0, i)) == 0);
        }
        CHECK(reader.next(&value) == VKP_OK);
        CHECK(reader.next(&value) == VKP_ERR_EMPTY);
        CHECK(frame_len(bytes + ":1\r\n") == bytes.size());
        CHECK(frame_len(bytes + ".\r\n") == bytes.size());
    }
    CHECK(frame_len("$?\r\n;0\r\n") == 8);
    CHECK(frame_len("$?\r\n;01\r\n") == 0); // a chunk of one byte, which the reader refuses
}

TEST_CASE("streamed: random trees are those that they are counted", "[resp][streamed][split]")
{
    for (unsigned seed = 0; seed < 300; seed++) {
        Generator generator(seed);
        generator.value(0, 0);
        INFO("seed " << seed);
        check_streamed(generator.streamed, generator.bytes);
    }
}

TEST_CASE("streamed: without the flag all of them are refused", "[resp][streamed][refusals]")
{
    for (const Pair &pair : k_streamed) {
        INFO(pair.streamed);
        for (const vkp_resp_config &config : {plain_config(), lenient_config()}) {
            const Outcome outcome = read_fed(pair.streamed, {}, config);
            CHECK(outcome.frames.empty());
            CHECK(outcome.status == VKP_ERR_PROTOCOL);
            CHECK(outcome.reason == (contains(pair.streamed, "?\r\n")
                                         ? "digit expected, byte 0x3f found"
                                         : outcome.reason));
        }
    }
    Reader reader;
    CHECK(reader.verdict(";1\r\n") == VKP_ERR_PROTOCOL);
    CHECK(reader.reason() == "unknown type byte ';': streamed types are not supported");
}

TEST_CASE("streamed: what must be refused, where, and why", "[resp][streamed][refusals]")
{
    const Refusal rows[] = {
        // Ends and chunks where none is open.
        {".\r\n", BAD, BAD, 0, "end (.) outside"},
        {";1\r\na\r\n", BAD, BAD, 0, "chunk (;) outside"},
        {";0\r\n", BAD, BAD, 0, "chunk (;) outside"},
        {"*1\r\n.\r\n", BAD, BAD, 4, "end (.) outside"},
        {"*?\r\n*1\r\n.\r\n", BAD, BAD, 8, "end (.) outside"},
        {"*?\r\n;1\r\na\r\n", BAD, BAD, 4, "chunk (;) outside"},
        {"*?\r\n.\r\n.\r\n", BAD, BAD, 7, "end (.) outside"},
        {"$?\r\n;0\r\n;0\r\n", BAD, BAD, 8, "chunk (;) outside"},
        // Something else than a chunk in a string.
        {"$?\r\n.\r\n", BAD, BAD, 4, "chunk of a streamed string expected, byte 0x2e"},
        {"$?\r\n:1\r\n", BAD, BAD, 4, "chunk of a streamed string expected, byte 0x3a"},
        {"$?\r\n;1\r\na\r\n$1\r\nb\r\n", BAD, BAD, 11, "chunk of a streamed string expected"},
        {"*?\r\n$?\r\n;1\r\na\r\n.\r\n", BAD, BAD, 15, "chunk of a streamed string expected"},
        {"$?\r\n|1\r\n", BAD, BAD, 4, "chunk of a streamed string expected"},
        // Lengths of chunks, and what follows them.
        {"$?\r\n;-1\r\n", BAD, BAD, 5, "sign"},
        {"$?\r\n;+1\r\n", BAD, BAD, 5, "sign"},
        {"$?\r\n;01\r\n", BAD, BAD, 5, "zero"},
        {"$?\r\n;00\r\n", BAD, BAD, 5, "zero"},
        {"$?\r\n;\r\n", BAD, BAD, 5, "digit"},
        {"$?\r\n;?\r\n", BAD, BAD, 5, "digit"},
        {"$?\r\n;1\r\nabc\r\n", BAD, BAD, 9, "CRLF"},
        {"$?\r\n;2\r\na\r\n;0\r\n", BAD, BAD, 10, "CRLF"},
        {"$?\r\n;0\n", BAD, BAD, 6, "CRLF"},
        {"$?\r\n;0\rx", BAD, BAD, 7, "LF"},
        // The headers and the end.
        {"$?x\r\n", BAD, BAD, 2, "CRLF"},
        {"$?\n", BAD, BAD, 2, "CRLF"},
        {"*?\rx", BAD, BAD, 3, "LF"},
        {"*?1\r\n", BAD, BAD, 2, "CRLF"},
        {"*??\r\n", BAD, BAD, 2, "CRLF"},
        {"$-?\r\n", BAD, BAD, 2, "digit"},
        {"*-?\r\n", BAD, BAD, 2, "digit"},
        {"$1?\r\n", BAD, BAD, 2, "CRLF"},
        {"*?\r\n.x", BAD, BAD, 5, "CRLF"},
        {"*?\r\n.\n", BAD, BAD, 5, "CRLF"},
        {"*?\r\n.\rx", BAD, BAD, 6, "LF"},
        // A key without a value, an attribute without one.
        {"%?\r\n+k\r\n.\r\n", BAD, BAD, 8, "key without a value"},
        {"%?\r\n+k\r\n+v\r\n+k\r\n.\r\n", BAD, BAD, 16, "key without a value"},
        {"*?\r\n|1\r\n+k\r\n+v\r\n.\r\n", BAD, BAD, 16, "behind an attribute"},
        {"%?\r\n+k\r\n|0\r\n.\r\n", BAD, BAD, 12, "behind an attribute"},
        // The specification streams strings, arrays, sets and maps alone.
        {">?\r\n+kind\r\n.\r\n", BAD, BAD, 0, "a push cannot be streamed"},
        {"|?\r\n+k\r\n+v\r\n.\r\n", BAD, BAD, 0, "an attribute cannot be streamed"},
        {"!?\r\n;0\r\n", BAD, BAD, 1, "digit"},
        {"=?\r\n;0\r\n", BAD, BAD, 1, "digit"},
        {":?\r\n", BAD, BAD, 1, "digit"},
        // The kind of a push is a string, streamed or not.
        {">1\r\n*?\r\n+kind\r\n.\r\n", BAD, BAD, 4, "kind"},
        {"*?\r\n>1\r\n.\r\n", BAD, BAD, 8, "kind"},
        {">1\r\n;1\r\na\r\n", BAD, BAD, 4, "kind"},
    };
    for (const Refusal &row : rows) {
        INFO(row.bytes);
        vkp_resp_config lenient = streamed_config();
        lenient.lenient = true;
        for (const vkp_resp_config &config : {streamed_config(), lenient}) {
            const Outcome outcome = read_fed(row.bytes, {}, config);
            CHECK(outcome.status == row.strict);
            CHECK(outcome.position == row.position);
            INFO(outcome.reason);
            CHECK(contains(outcome.reason, row.word));
            std::string example;
            const size_t differing = differing_splits(row.bytes, config, &example);
            INFO(example);
            CHECK(differing == 0);
        }
    }
}

TEST_CASE("streamed: the bulk limit is that of the whole string", "[resp][streamed][limits]")
{
    vkp_resp_config config = streamed_config();
    config.max_bulk_bytes = 10;
    const std::string ten = "$?\r\n;4\r\nabcd\r\n;6\r\nefghij\r\n";
    CHECK(read_fed(ten + ";0\r\n", {}, config).frames ==
          std::vector<std::string>{"string(abcdefghij)"});
    std::string example;
    for (const std::string &over :
         {ten + ";1\r\n", std::string("$?\r\n;11\r\n"), ten + ";9223372036854775807\r\n"}) {
        const Outcome outcome = read_fed(over, {}, config);
        CHECK(outcome.status == VKP_ERR_LIMIT);
        CHECK(outcome.position == over.find_last_of(';')); // its bytes are not waited for
        CHECK(outcome.reason == "streamed string above max_bulk_bytes (10)");
        CHECK(differing_splits(over, config, &example) == 0);
    }
    // Each string has the whole limit.
    CHECK(read_fed("*?\r\n" + ten + ";0\r\n" + ten + ";0\r\n.\r\n", {}, config).frames.size() == 1);
}

TEST_CASE("streamed: the limit of elements is enforced before the element that is too many",
          "[resp][streamed][limits]")
{
    vkp_resp_config config = streamed_config();
    config.max_elements = 2;
    const std::string attribute = "|1\r\n+k\r\n+v\r\n";
    const std::string message = ">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nm\r\n";
    const std::string confirmation = ">2\r\n$9\r\nsubscribe\r\n+c\r\n";
    vkp_resp_config for_pushes = config;
    for_pushes.max_elements = 3;
    std::string example;
    for (const std::string &fits :
         {std::string("*?\r\n:1\r\n:2\r\n.\r\n"), std::string("~?\r\n:1\r\n:2\r\n.\r\n"),
          std::string("%?\r\n:1\r\n:2\r\n:3\r\n:4\r\n.\r\n"),
          "*?\r\n" + attribute + ":1\r\n" + attribute + ":2\r\n.\r\n",
          std::string("*?\r\n*?\r\n:1\r\n:2\r\n.\r\n*?\r\n:1\r\n:2\r\n.\r\n.\r\n")}) {
        INFO(fits);
        CHECK(read_fed(fits, {}, config).frames.size() == 1);
    }
    CHECK(read_fed("*?\r\n:1\r\n:2\r\n:3\r\n" + message + ".\r\n", {}, for_pushes).frames.size() ==
          1);
    struct Row {
        std::string bytes;
        uint64_t position;
        bool pushes;
    };
    for (const Row &row :
         {Row{"*?\r\n:1\r\n:2\r\n$", 12, false}, Row{"~?\r\n:1\r\n:2\r\n*", 12, false},
          Row{"%?\r\n:1\r\n:2\r\n:3\r\n:4\r\n:", 20, false},
          Row{"*?\r\n:1\r\n:2\r\n$?\r\n", 12, false},
          Row{"*?\r\n:1\r\n:2\r\n" + attribute + ":", 24, false},
          Row{"*?\r\n:1\r\n:2\r\n:3\r\n" + message + ":", 47, true},
          // Whether it is an element is known when it is complete.
          Row{"*?\r\n:1\r\n:2\r\n:3\r\n" + confirmation + ".", 39, true}}) {
        INFO(row.bytes);
        const vkp_resp_config &limits = row.pushes ? for_pushes : config;
        const Outcome outcome = read_fed(row.bytes, {}, limits);
        CHECK(outcome.status == VKP_ERR_LIMIT);
        CHECK(outcome.position == row.position);
        CHECK(outcome.reason == "streamed aggregate of more elements than max_elements (" +
                                    std::to_string(limits.max_elements) + ")");
        CHECK(differing_splits(row.bytes, limits, &example) == 0);
    }
}

TEST_CASE("streamed: the limits of depth and of the frame", "[resp][streamed][limits]")
{
    vkp_resp_config config = streamed_config();
    config.max_depth = 3;
    // A string is no level.
    CHECK(read_fed("*?\r\n*?\r\n*?\r\n$?\r\n;1\r\na\r\n;0\r\n.\r\n.\r\n.\r\n", {}, config)
              .frames.size() == 1);
    const Outcome deep = read_fed(repeat("*?\r\n", 4), {}, config);
    CHECK(deep.status == VKP_ERR_LIMIT);
    CHECK(deep.position == 12);
    // After an end a level is free again.
    CHECK(read_fed("*?\r\n" + repeat("*?\r\n~?\r\n.\r\n.\r\n", 50) + ".\r\n", {}, config)
              .frames.size() == 1);

    std::string example;
    for (const Pair &pair : k_streamed) {
        const std::string bytes = pair.streamed;
        INFO(bytes);
        config = streamed_config();
        config.max_frame_bytes = bytes.size();
        CHECK(read_fed(bytes + bytes, {}, config).frames.size() == 2);
        CHECK(differing_splits(bytes + bytes, config, &example) == 0);
        for (size_t most = 1; most < bytes.size(); most++) {
            config.max_frame_bytes = most;
            REQUIRE(read_fed(bytes, {}, config).status == VKP_ERR_LIMIT);
            REQUIRE(read_fed(bytes, every_byte(bytes), config).status == VKP_ERR_LIMIT);
        }
    }
}

TEST_CASE("streamed: memory grows with the bytes received", "[resp][streamed][limits]")
{
    for (const std::string &bytes :
         {std::string("$?\r\n;536870912\r\n"), "*?\r\n" + repeat("_\r\n", 20000),
          repeat("*?\r\n", 128), "*?\r\n" + repeat("*?\r\n.\r\n", 20000),
          "*?\r\n" + repeat("$?\r\n;0\r\n", 20000), "$?\r\n" + repeat(";1\r\na\r\n", 20000)}) {
        INFO(bytes.substr(0, 40));
        Env env;
        vkp_resp_config config = streamed_config();
        config.env = &env.test.env;
        {
            Reader reader(config);
            CHECK(reader.verdict(bytes) == VKP_ERR_EMPTY);
            CHECK(vkp_test_env_peak_bytes(&env.test) <= 2048 + 64 * bytes.size());
        }
        CHECK(env.blocks() == 0);
    }
}

TEST_CASE("streamed: a string of a million chunks is copied once, and its memory is given back",
          "[resp][streamed][limits]")
{
    Env env;
    vkp_resp_config config = streamed_config();
    config.env = &env.test.env;
    const size_t chunks = 1500000;
    const std::string bytes = "$?\r\n" + repeat(";1\r\na\r\n", chunks) + ";0\r\n";
    {
        Reader reader(config);
        const vkp_value *value = nullptr;
        size_t consumed = 0;
        const uint64_t before = vkp_test_env_calls(&env.test);
        vkp_status status = VKP_ERR_EMPTY;
        // In windows that grow: the bytes before are not read again.
        for (size_t len = 0; status == VKP_ERR_EMPTY && len < bytes.size();) {
            len = std::min(bytes.size(), len + 64);
            status = vkp_resp_reader_scan(reader.get(), bytes.data(), len, &value, &consumed);
        }
        REQUIRE(status == VKP_OK);
        CHECK(consumed == bytes.size());
        CHECK(std::string(value->u.str, value->len) == std::string(chunks, 'a'));
        CHECK(vkp_test_env_calls(&env.test) - before < 40); // a doubling each, no more
        CHECK(vkp_test_env_live_bytes(&env.test) >= chunks);
        REQUIRE(vkp_resp_reader_scan(reader.get(), ":1\r\n", 4, &value, &consumed) == VKP_OK);
        CHECK(vkp_test_env_live_bytes(&env.test) < 8192);
    }
    CHECK(env.blocks() == 0);
}

TEST_CASE("streamed: one reader takes frames without growing, and begins each anew",
          "[resp][streamed]")
{
    Env env;
    vkp_resp_config config = streamed_config();
    config.env = &env.test.env;
    {
        Reader reader(config);
        const vkp_value *value = nullptr;
        const std::string message = ">3\r\n$7\r\nmessage\r\n$2\r\nc1\r\n$2\r\nhi\r\n";
        size_t settled = 0;
        for (int i = 0; i < 5000; i++) {
            for (const Pair &pair : k_streamed) {
                REQUIRE(reader.feed(pair.streamed + message) == VKP_OK);
                REQUIRE(reader.next(&value) == VKP_OK);
                REQUIRE(reader.next(&value) == VKP_OK);
                REQUIRE(tree_text(value) == "push[3]+4 string(message) string(c1) string(hi)");
            }
            settled = i == 10 ? vkp_test_env_live_bytes(&env.test) : settled;
        }
        CHECK(vkp_test_env_live_bytes(&env.test) == settled);
    }
    CHECK(env.blocks() == 0);
}

TEST_CASE("streamed: reset in the midst of a frame forgets it", "[resp][streamed]")
{
    for (const Pair &pair : k_streamed) {
        const std::string bytes = pair.streamed;
        for (size_t cut = 0; cut < bytes.size(); cut++) {
            Reader reader(streamed_config());
            const vkp_value *value = nullptr;
            REQUIRE(reader.feed(bytes.substr(0, cut)) == VKP_OK);
            REQUIRE(reader.next(&value) == VKP_ERR_EMPTY);
            vkp_resp_reader_reset(reader.get());
            REQUIRE(reader.feed("$?\r\n;3\r\nnew\r\n;0\r\n.") == VKP_OK);
            REQUIRE(reader.next(&value) == VKP_OK);
            REQUIRE(tree_text(value) == "string(new)");
            REQUIRE(reader.next(&value) == VKP_ERR_PROTOCOL);
            REQUIRE(reader.position() == 17);
        }
    }
}

TEST_CASE("streamed: memory may fail at every allocation; the reader goes on",
          "[resp][streamed][faults]")
{
    std::string bytes = repeat("*?\r\n", 100);
    bytes += "$?\r\n" + repeat(";9\r\n123456789\r\n", 300) + ";0\r\n" + repeat(".\r\n", 100);
    for (const Pair &pair : k_streamed) {
        bytes += pair.streamed;
    }
    const Outcome expected = read_fed(bytes, {}, streamed_config());
    REQUIRE(expected.frames.size() == 1 + sizeof k_streamed / sizeof k_streamed[0]);
    Env env;
    vkp_resp_config config = streamed_config();
    config.env = &env.test.env;
    bool met = true;
    for (uint64_t k = 1; met; k++) {
        INFO("k " << k);
        Reader reader(config);
        Outcome outcome;
        vkp_test_env_fault(&env.test, VKP_TEST_FAULT_ONCE, k);
        met = false;
        size_t at = 0;
        vkp_status status = VKP_OK;
        while (status == VKP_OK || status == VKP_ERR_NOMEM) {
            const vkp_value *value = nullptr;
            size_t consumed = 0;
            status = vkp_resp_reader_scan(reader.get(), bytes.data() + at, bytes.size() - at,
                                          &value, &consumed);
            met = met || status == VKP_ERR_NOMEM;
            if (status == VKP_OK) {
                note(outcome, value);
                at += consumed;
            }
        }
        vkp_test_env_fault(&env.test, VKP_TEST_FAULT_NONE, 0);
        finish(outcome, reader.get(), status);
        CHECK(outcome.same(expected));
        CHECK((met || k > 10));
    }
    CHECK(env.blocks() == 0);
}
