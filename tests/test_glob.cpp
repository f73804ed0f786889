// SPDX-License-Identifier: MIT
//
// Glob patterns of PSUBSCRIBE: by a table, against a plain recursive matcher, and against a server.
#include "support/catch.hpp"

#include <random>
#include <set>
#include <string>
#include <vector>

#include "support/support.h"

namespace {

vkp_str view(const std::string &text)
{
    vkp_str out;
    out.ptr = text.data();
    out.len = text.size();
    return out;
}

bool matches(const std::string &pattern, const std::string &text)
{
    return vkp_glob_is_match(view(pattern), view(text));
}

struct Row {
    const char *pattern;
    const char *text;
    bool expected;
};

const Row k_rows[] = {
    {"", "", true},
    {"", "a", false},
    {"a", "", false},
    {"news", "news", true},
    {"news", "new", false},
    {"news", "newsy", false},
    {"news", "News", false},
    // * is any text, also none.
    {"*", "anything", true},
    {"***", "x", true},
    {"n*", "n", true},
    {"n*", "news", true},
    {"n*", "on", false},
    {"*s", "news", true},
    {"*s", "newsy", false},
    {"n*s", "ns", true},
    {"n*s", "news", true},
    {"n*s", "newsx", false},
    {"*a*b*", "xxaxxbxx", true},
    {"*a*b*", "xxbxxaxx", false},
    {"a*a", "a", false},
    {"*aab", "aaab", true},
    {"*ab*ab", "abab", true},
    {"*ab*ab", "abxab", true},
    {"*ab*ab", "ab", false},
    // ? is one byte.
    {"?", "", false},
    {"?", "a", true},
    {"?", "ab", false},
    {"n?ws", "news", true},
    {"??", "a", false},
    {"*?", "", false},
    {"*?", "a", true},
    {"?*", "abc", true},
    {"a?c*e", "abcde", true},
    {"?", "\xc3\xa4", false},
    {"??", "\xc3\xa4", true},
    // Classes.
    {"[abc]", "a", true},
    {"[abc]", "c", true},
    {"[abc]", "d", false},
    {"[abc]", "", false},
    {"[abc]", "ab", false},
    {"h[ae]llo", "hallo", true},
    {"h[ae]llo", "hillo", false},
    {"[^e]", "e", false},
    {"[^e]", "a", true},
    {"[^e]", "", false},
    {"h[^e]llo", "hallo", true},
    {"h[^e]llo", "hello", false},
    {"[a-c]", "a", true},
    {"[a-c]", "b", true},
    {"[a-c]", "c", true},
    {"[a-c]", "d", false},
    {"[c-a]", "b", true},
    {"[^a-c]", "b", false},
    {"[^a-c]", "z", true},
    {"[a-cx-z]", "y", true},
    {"[a-cx-z]", "m", false},
    {"[0-9][0-9]", "42", true},
    {"[a-a]", "a", true},
    {"[-a]", "-", true},
    {"[*]", "*", true},
    {"[*]", "a", false},
    {"[?]", "?", true},
    {"[?]", "a", false},
    {"[^^]", "^", false},
    {"[a^]", "^", true},
    {"[\\]]", "]", true},
    {"[\\]]", "\\", false},
    {"[\\^a]", "^", true},
    {"[\\-]", "-", true},
    {"*[0-9]*", "ab5cd", true},
    {"*[0-9]", "ab5cd", false},
    {"[]", "a", false},
    {"[]", "", false},
    {"[^]", "a", true},
    {"[^]", "", false},
    // A class without its end ends with the pattern.
    {"[abc", "b", true},
    {"[abc", "x", false},
    {"[", "[", false},
    {"[^a", "b", true},
    // Escapes.
    {"\\*", "*", true},
    {"\\*", "a", false},
    {"\\?", "?", true},
    {"\\?", "a", false},
    {"\\[a]", "[a]", true},
    {"\\[a]", "a", false},
    {"\\\\", "\\", true},
    {"a\\bc", "abc", true},
    {"*\\*", "ab*", true},
    {"*\\*", "ab", false},
    {"a\\", "a\\", true},
    {"a\\", "a", false},
    // Bytes that mean nothing special.
    {"]", "]", true},
    {"a-c", "a-c", true},
    {"^a", "^a", true},
    {"{a,b}", "a", false},
    {"{a,b}", "{a,b}", true},
    {"__keyspace@0__:*", "__keyspace@0__:k", true},
};

// The plain way, exponential at worst: for patterns of literals, ?, * and whole classes.
bool plain(const char *p, const char *p_end, const char *t, const char *t_end)
{
    if (p == p_end) {
        return t == t_end;
    }
    if (*p == '*') {
        return plain(p + 1, p_end, t, t_end) || (t < t_end && plain(p, p_end, t + 1, t_end));
    }
    if (t == t_end) {
        return false;
    }
    if (*p == '[') {
        const bool negated = p[1] == '^';
        const char *at = p + (negated ? 2 : 1);
        bool found = false;
        for (; *at != ']'; at++) {
            if (at[1] == '-') {
                found = found || (*at <= *t && *t <= at[2]);
                at += 2;
            } else {
                found = found || *at == *t;
            }
        }
        return found != negated && plain(at + 1, p_end, t + 1, t_end);
    }
    return (*p == '?' || *p == *t) && plain(p + 1, p_end, t + 1, t_end);
}

template <typename Random>
std::string random_text(Random &random, const char *alphabet, size_t letters, size_t longest)
{
    std::string out;
    for (size_t left = random() % (longest + 1); left > 0; left--) {
        out += alphabet[random() % letters];
    }
    return out;
}

} // namespace

TEST_CASE("glob: the table", "[glob]")
{
    for (const Row &row : k_rows) {
        INFO("'" << row.pattern << "' against '" << row.text << "'");
        CHECK(matches(row.pattern, row.text) == row.expected);
    }
}

TEST_CASE("glob: zero bytes are bytes, and empty views may be NULL", "[glob]")
{
    CHECK(matches(std::string("a\0b", 3), std::string("a\0b", 3)));
    CHECK_FALSE(matches(std::string("a\0b", 3), std::string("a\0c", 3)));
    CHECK(matches("a?b", std::string("a\0b", 3)));
    CHECK(matches("*", std::string("\0\0", 2)));
    const vkp_str nothing = vkp_str_of(nullptr);
    CHECK(vkp_glob_is_match(nothing, nothing));
    CHECK_FALSE(vkp_glob_is_match(vkp_str_of("?"), nothing));
    CHECK_FALSE(vkp_glob_is_match(nothing, vkp_str_of("a")));
}

TEST_CASE("glob: every byte matches itself and ?, and nothing reads past the views", "[glob]")
{
    for (int byte = 0; byte < 256; byte++) {
        INFO("byte " << byte);
        const std::string text(1, static_cast<char>(byte));
        CHECK(matches("?", text));
        CHECK(matches("\\" + text, text));
        CHECK(
            matches("*" + std::string(byte == '*' || byte == '?' || byte == '[' ? "\\" : "") + text,
                    "x" + text));
    }
    // Exact-size heap copies: a matcher that looks further is caught by a sanitizer.
    for (const char *pattern :
         {"[", "[^", "[a", "[a-", "[a-b", "[\\", "\\", "*", "*[", "a*\\", "[]-"}) {
        for (const char *text : {"", "a", "ab", "\\"}) {
            const std::vector<char> p(pattern, pattern + std::string(pattern).size());
            const std::vector<char> t(text, text + std::string(text).size());
            vkp_str pattern_view = {p.data(), p.size()};
            vkp_str text_view = {t.data(), t.size()};
            CHECK(vkp_glob_is_match(pattern_view, text_view) == matches(pattern, text));
        }
    }
}

TEST_CASE("glob: random patterns match as the plain matcher says", "[glob]")
{
    std::mt19937 random(5);
    const char *const pieces[] = {"a", "b", "c", "?", "*", "*", "[ab]", "[^a]", "[a-b]", "[^b-c]"};
    size_t wrong = 0;
    size_t positive = 0;
    std::string example;
    for (int i = 0; i < 200000; i++) {
        std::string pattern;
        for (size_t left = random() % 8; left > 0; left--) {
            pattern += pieces[random() % (sizeof pieces / sizeof pieces[0])];
        }
        const std::string text = random_text(random, "abc", 3, 9);
        const bool expected = plain(pattern.data(), pattern.data() + pattern.size(), text.data(),
                                    text.data() + text.size());
        positive += expected;
        if (matches(pattern, text) != expected) {
            wrong++;
            example = pattern + " against " + text;
        }
    }
    INFO(example);
    CHECK(wrong == 0);
    CHECK(positive > 10000);
}

TEST_CASE("glob: hostile patterns cost no more than text times pattern", "[glob]")
{
    // A matcher that backs up over more than the last star never ends here.
    std::string stars;
    for (int i = 0; i < 60; i++) {
        stars += "*a";
    }
    const std::string text(20000, 'a');
    CHECK_FALSE(matches(stars + "*b", text));
    CHECK(matches(stars + "*", text));
    CHECK_FALSE(matches(std::string(20000, '*') + "b", text));
    CHECK(matches(std::string(20000, '*'), text));
    std::string classes;
    for (int i = 0; i < 60; i++) {
        classes += "*[ab]?";
    }
    CHECK_FALSE(matches(classes + "b", text));
    // Deep patterns are no deep recursion.
    CHECK(matches(std::string(200000, '?'), std::string(200000, 'x')));
    CHECK_FALSE(matches(std::string(200000, '?'), std::string(200001, 'x')));
}

TEST_CASE("glob: as a server matches", "[glob][server]")
{
    if (vkp_test_server_program() == nullptr) {
        WARN("no server program here");
        return;
    }
    vkp_test_server *server = vkp_test_server_open(nullptr);
    vkp_test_peer *peer = vkp_test_peer_open(vkp_test_server_unix(server));
    std::mt19937 random(11);
    std::vector<std::string> keys;
    std::set<std::string> seen;
    // Every text up to three letters of those that patterns use, and longer ones.
    const std::string letters = "ab]-^\\*?[";
    for (char a : letters) {
        keys.push_back(std::string(1, a));
        for (char b : letters) {
            keys.push_back(std::string(1, a) + b);
        }
    }
    for (int i = 0; i < 150; i++) {
        keys.push_back("k" + random_text(random, "abc-^]\\", 7, 6));
    }
    for (const std::string &key : keys) {
        if (seen.insert(key).second) {
            REQUIRE(vkp_test_ask(peer, "SET", key.c_str(), "1") == "+OK\r\n");
        }
    }
    std::string example;
    size_t wrong = 0;
    size_t found = 0;
    for (int i = 0; i < 4000; i++) {
        const std::string pattern = random_text(random, "ab**?[]^-\\k", 11, 8);
        if (pattern.empty()) {
            continue;
        }
        std::set<std::string> expected;
        std::string reply = vkp_test_ask(peer, "KEYS", pattern.c_str());
        REQUIRE(reply.substr(0, 1) == "*");
        size_t at = reply.find("\r\n") + 2;
        while (at < reply.size()) {
            const size_t line = reply.find("\r\n", at);
            const size_t len = std::stoul(reply.substr(at + 1, line - at - 1));
            expected.insert(reply.substr(line + 2, len));
            at = line + 2 + len + 2;
        }
        found += expected.size();
        for (const std::string &key : seen) {
            if (matches(pattern, key) != (expected.count(key) != 0)) {
                wrong++;
                example = pattern + " against " + key;
            }
        }
    }
    INFO(example);
    CHECK(wrong == 0);
    CHECK(found > 5000);
    vkp_test_peer_close(peer);
    vkp_test_server_close(server);
}
