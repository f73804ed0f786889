// SPDX-License-Identifier: MIT
//
// Commands from a format: what each conversion puts, where arguments begin and end, which formats
// are refused. The rows marked "ours" are those in which hiredis' redisFormatCommand differs.
#include "support/catch.hpp"
#include "support/fake_server.h"
#include "support/numeric_locale.h"

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace {

using Env = vkp_test_counted;

std::string taken(vkp_resp_writer *writer)
{
    vkp_bytes bytes = VKP_ZERO;
    const vkp_status status = vkp_resp_writer_take(writer, &bytes);
    if (status != VKP_OK) {
        return vkp_status_str(status);
    }
    std::string text;
    if (bytes.len > 0) {
        text.assign(reinterpret_cast<const char *>(bytes.data), bytes.len);
    }
    vkp_bytes_unref(&bytes);
    return text;
}

// The command of a format, or the status as a text.
std::string made(const char *format, ...)
{
    vkp_resp_writer writer;
    va_list arguments;
    vkp_resp_writer_init(&writer, nullptr);
    va_start(arguments, format);
    vkp_resp_put_vcommandf(&writer, format, arguments);
    va_end(arguments);
    return taken(&writer);
}

const char *const invalid = vkp_status_str(VKP_ERR_INVALID);

// The words of a command, by the library's reader; "broken" when the bytes are not one command.
std::vector<std::string> read_back(const std::string &bytes)
{
    std::vector<std::string> words;
    vkp_resp_reader *reader = nullptr;
    const vkp_value *value = nullptr;
    size_t consumed = 0;
    REQUIRE(vkp_resp_reader_open(nullptr, &reader) == VKP_OK);
    if (vkp_resp_reader_scan(reader, bytes.data(), bytes.size(), &value, &consumed) != VKP_OK ||
        consumed != bytes.size() || value->type != VKP_RESP_ARRAY) {
        words.emplace_back("broken");
    } else {
        for (const vkp_value *at = vkp_value_get_first(value); at != nullptr;
             at = vkp_value_get_next(value, at)) {
            words.emplace_back(vkp_test_view(vkp_value_get_str(at)));
        }
    }
    vkp_resp_reader_unref(reader);
    return words;
}

// Sends by a function of the program that is variadic itself.
vkp_status sent(vkp_client *client, vkp_oneshot *slot, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    const vkp_status status = vkp_client_vcommandf(client, slot, format, arguments);
    va_end(arguments);
    return status;
}

} // namespace

TEST_CASE("format: blanks of the format separate arguments, and nothing else does", "[format]")
{
    CHECK(made("PING") == "*1\r\n$4\r\nPING\r\n");
    CHECK(made("SET key value") == "*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$5\r\nvalue\r\n");
    CHECK(made("  SET   key  v  ") == wire({"SET", "key", "v"}));
    CHECK(made("SET\tk\nv\r") == wire({"SET\tk\nv\r"}));
    CHECK(made("\tSET \n \t") == wire({"\tSET", "\n", "\t"}));
    CHECK(made("SET %s %s", "a b", " c ") == wire({"SET", "a b", " c "}));
    CHECK(made("SET \"a b\" 'c'") == wire({"SET", "\"a", "b\"", "'c'"}));
    CHECK(made("%s", "PING PONG") == wire({"PING PONG"}));
    CHECK(made("%s %s", "GET", "%s %d") == wire({"GET", "%s %d"}));
    CHECK(made("\xc3\xa9 \xff") == wire({"\xc3\xa9", "\xff"}));
}

TEST_CASE("format: a conversion may be a part of an argument", "[format]")
{
    CHECK(made("GET user:%d", 7) == wire({"GET", "user:7"}));
    CHECK(made("GET %s:%d:%s", "a", -1, "b") == wire({"GET", "a:-1:b"}));
    CHECK(made("%s%s %s", "G", "ET", "k") == wire({"GET", "k"}));
    CHECK(made("GET %d%%", 50) == wire({"GET", "50%"}));
    CHECK(made("GET %%d %%") == wire({"GET", "%d", "%"}));
    CHECK(made("%%%s%%", "x") == wire({"%x%"}));
    CHECK(made("GET {%s}.%b", "slot", "a b", size_t(3)) == wire({"GET", "{slot}.a b"}));
}

TEST_CASE("format: an empty text is an empty argument", "[format]")
{
    CHECK(made("SET %s %s", "", "") == "*3\r\n$3\r\nSET\r\n$0\r\n\r\n$0\r\n\r\n");
    CHECK(made("SET k %b", "", size_t(0)) == wire({"SET", "k", ""}));
    CHECK(made("SET k %b", static_cast<const char *>(nullptr), size_t(0)) ==
          wire({"SET", "k", ""}));
    CHECK(made("SET k%s %s%s", "", "", "") == wire({"SET", "k", ""}));
    CHECK(made("%s", "") == wire({""}));
    CHECK(made("SET k %.0d", 0) == wire({"SET", "k", ""}));
}

TEST_CASE("format: bytes are put as they are", "[format]")
{
    const std::string binary("a \0\r\n%s\xff ", 9);
    CHECK(made("SET %b x", binary.data(), binary.size()) == wire({"SET", binary, "x"}));
    CHECK(made("SET k%bk", binary.data(), binary.size()) == wire({"SET", "k" + binary + "k"}));
    CHECK(made("%b %b", "GET", size_t(3), "key", size_t(1)) == wire({"GET", "k"}));
    const std::string large(1 << 20, 'x');
    CHECK(made("SET %s %b%d", "k", large.data(), large.size(), 5) ==
          wire({"SET", "k", large + "5"}));
    CHECK(made("X %c%c%c", 'a', 0, ' ') == wire({"X", std::string("a\0 ", 3)})); // ours
    CHECK(made("X %c", 0x1ff) == wire({"X", "\xff"}));                           // ours
}

TEST_CASE("format: numbers are printf's", "[format]")
{
    CHECK(made("%d %i %u", -5, 5, 4000000000u) == wire({"-5", "5", "4000000000"}));
    CHECK(made("%o %x %X", 8u, 255u, 255u) == wire({"10", "ff", "FF"}));
    CHECK(made("%ld %li %lu %lx", -5L, 5L, 7UL, 255UL) == wire({"-5", "5", "7", "ff"}));
    CHECK(made("%lld %llu", INT64_MIN, UINT64_MAX) ==
          wire({"-9223372036854775808", "18446744073709551615"}));
    CHECK(made("%hd %hu %hhd %hhu", 65537, 65537, 257, 257) == wire({"1", "1", "1", "1"}));
    CHECK(made("%zu %zd", SIZE_MAX, static_cast<size_t>(-1)) ==
          wire({std::to_string(SIZE_MAX), "-1"})); // ours
    CHECK(made("%jd %ju", INTMAX_MIN, UINTMAX_MAX) ==
          wire({std::to_string(INTMAX_MIN), std::to_string(UINTMAX_MAX)})); // ours
    CHECK(made("%td", static_cast<ptrdiff_t>(-3)) == wire({"-3"}));         // ours
    CHECK(made("%f %F %e %E", 1.5, 2.5, 1.5, 1.5) ==
          wire({"1.500000", "2.500000", "1.500000e+00", "1.500000E+00"}));
    CHECK(made("%g %G %a %A", 0.5, 1e-10, 1.0, 0.5) == wire({"0.5", "1E-10", "0x1p+0", "0X1P-1"}));
    CHECK(made("%g %F %g", INFINITY, -INFINITY, NAN) == wire({"inf", "-INF", "nan"}));
    CHECK(made("%.3f %.17g %.0f", 3.14159, 0.1, 2.0) ==
          wire({"3.142", "0.10000000000000001", "2"}));
    CHECK(made("%08.3f", 1234.5678) == wire({"1234.568"}));
}

TEST_CASE("format: flags, width and precision", "[format]")
{
    CHECK(made("%5d|%-5d|%05d|%+d|% d", 42, 42, 42, 42, 42) == wire({"   42|42   |00042|+42| 42"}));
    CHECK(made("%#x %#o %#.3g", 255u, 8u, 1.0) == wire({"0xff", "010", "1.00"}));
    CHECK(made("%.3d %8.5d %-8.5ld|", 7, -7, 7L) == wire({"007", "  -00007", "00007   |"}));
    CHECK(made("%+08.2f", 3.14159) == wire({"+0003.14"}));
    CHECK(made("%.d", 5) == wire({"5"}));
    CHECK(made("k%200dk", 1) == wire({"k" + std::string(199, ' ') + "1k"}));
    CHECK(made("%.100d", 1) == wire({std::string(99, '0') + "1"}));
    CHECK(
        made("%63d %64d %65d", 1, 1, 1) ==
        wire({std::string(62, ' ') + "1", std::string(63, ' ') + "1", std::string(64, ' ') + "1"}));
    // Every double has all its digits.
    CHECK(made("%f", std::numeric_limits<double>::max()).substr(4, 6) == "$316\r\n");
}

TEST_CASE("format: what follows a number is read at its place", "[format]")
{
    CHECK(made("%d %lld %s %f %zu %b %ld %c %s", 1, INT64_C(2), "three", 4.0, size_t(5), "six",
               size_t(3), 7L, '8',
               "nine") == wire({"1", "2", "three", "4.000000", "5", "six", "7", "8", "nine"}));
}

TEST_CASE("format: a double has a point in any locale", "[format]")
{
    const bool wide = GENERATE(false, true);
    const NumericLocale locale =
        wide ? NumericLocale("\xd9\xab", 0x66b, {"ps_AF.UTF-8", "fa_IR.UTF-8"})
             : NumericLocale(",", ',', {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8"});
    if (!locale.active) {
        WARN("no locale with another point here: checked in the C locale only");
    }
    CHECK(made("%f %g %d", 1.5, 1e20, 1000000) == wire({"1.500000", "1e+20", "1000000"}));
    CHECK(made("a,%.1fb %+.2e", -0.5, 1234.5) == wire({"a,-0.5b", "+1.23e+03"}));
}

TEST_CASE("format: wrong formats are refused, and the writer keeps what it had", "[format]")
{
    const char *const formats[] = {
        "",         " ",        "GET %",   "GET %%%", "%",
        "GET %d%", // the last four: ours
        "GET %y",   "GET %n",   "GET %p",  "GET %5s", "GET %.3s",
        "GET %-b",  "GET %l",   "GET %5",  "GET %.",  "GET %#",
        "GET %*d",  "GET %.*f", "GET %lf", "GET %Lf", "GET %lld%llq",
        "GET %hhh", "GET %lll", "GET %zz", "GET %ls", "GET %lc",
        "GET %5c",  "GET %\'d", "GET % ",  "GET %hs", "GET %0000000000000000000000000000001d"};
    for (const char *format : formats) {
        INFO(format);
        CHECK(made(format, 1, 1) == invalid);
    }
    CHECK(made(nullptr) == invalid);
    CHECK(made("GET %s", static_cast<const char *>(nullptr)) == invalid);
    CHECK(made("GET %b", static_cast<const char *>(nullptr), size_t(1)) == invalid);
    CHECK(made("GET %99999999999d", 1) == invalid);
    CHECK(made("GET %.99999999999d", 1) == invalid);

    vkp_resp_writer writer;
    vkp_resp_writer_init(&writer, nullptr);
    vkp_resp_put_commandf(&writer, "GET %d", 1);
    vkp_resp_put_commandf(&writer, "GET %y", 1);
    vkp_resp_put_commandf(&writer, "GET %d", 2);
    CHECK(taken(&writer) == invalid);
    vkp_resp_put_commandf(&writer, "GET %d", 3);
    CHECK(taken(&writer) == wire({"GET", "3"}));
    vkp_resp_put_simple(&writer, vkp_str_of("\n"));
    vkp_resp_put_commandf(&writer, "GET %d", 3);
    CHECK(taken(&writer) == invalid);
}

TEST_CASE("format: any number of arguments", "[format]")
{
    std::string format = "DEL";
    std::vector<std::string> words = {"DEL"};
    for (int i = 0; i < 5000; i++) {
        format += " k%%" + std::to_string(i);
        words.push_back("k%" + std::to_string(i));
    }
    CHECK(made(format.c_str()) == wire(words));
}

TEST_CASE("format: commands in one writer", "[format]")
{
    vkp_resp_writer writer;
    vkp_resp_writer_init(&writer, nullptr);
    vkp_resp_put_commandf(&writer, "SET %s %d", "a", 1);
    vkp_resp_put_commandf(&writer, "GET %s", "a");
    CHECK(taken(&writer) == wire({"SET", "a", "1"}) + wire({"GET", "a"}));
}

TEST_CASE("format: without memory at any point nothing is lost", "[format]")
{
    Env env;
    const std::string large(300, 'x');
    bool ok = false;
    for (uint64_t nth = 1; !ok; nth++) {
        REQUIRE(nth < 100);
        vkp_resp_writer writer;
        vkp_resp_writer_init(&writer, env.env());
        env.fault(VKP_TEST_FAULT_FROM, nth);
        vkp_resp_put_commandf(&writer, "SET %s%d %b %200d", "key", 1, large.data(), large.size(),
                              5);
        env.fault(VKP_TEST_FAULT_NONE, 0);
        const std::string text = taken(&writer);
        ok = text == wire({"SET", "key1", large, std::string(199, ' ') + "5"});
        if (!ok) {
            CHECK(text == vkp_status_str(VKP_ERR_NOMEM));
        }
    }
}

TEST_CASE("format: random commands read back as their arguments", "[format]")
{
    std::mt19937 random(20240229);
    const auto below = [&](unsigned n) { return static_cast<int>(random() % n); };
    for (int round = 0; round < 3000; round++) {
        // Eight conversions at most, each with the text of one argument and a number.
        std::string format;
        std::vector<std::string> words;
        std::string texts[8];
        int numbers[8];
        bool inside = false;
        for (int i = 0; i < 8; i++) {
            numbers[i] = below(2) == 0 ? below(1000) - 500 : static_cast<int>(random());
            for (int n = below(12); n > 0; n--) {
                texts[i] += static_cast<char>(below(4) == 0 ? " \r\n%$*"[below(6)] : below(256));
            }
            if (below(2) == 0) {
                format += std::string(static_cast<size_t>(below(2) + 1), ' ');
                inside = false;
            }
            std::string literal;
            for (int n = below(3); n > 0; n--) {
                literal += static_cast<char>('a' + below(26));
            }
            if (!inside) {
                words.emplace_back();
            }
            inside = true;
            words.back() += literal + texts[i] + ":" + std::to_string(numbers[i]);
            format += literal + "%b:%d";
        }
        const std::string bytes =
            made(format.c_str(), texts[0].data(), texts[0].size(), numbers[0], texts[1].data(),
                 texts[1].size(), numbers[1], texts[2].data(), texts[2].size(), numbers[2],
                 texts[3].data(), texts[3].size(), numbers[3], texts[4].data(), texts[4].size(),
                 numbers[4], texts[5].data(), texts[5].size(), numbers[5], texts[6].data(),
                 texts[6].size(), numbers[6], texts[7].data(), texts[7].size(), numbers[7]);
        INFO(format);
        if (read_back(bytes) != words || bytes != wire(words)) {
            CHECK(read_back(bytes) == words);
        }
    }
}

TEST_CASE("format: random formats give one whole command or INVALID", "[format]")
{
    // Only conversions that take an int may come out of these letters.
    const char letters[] = "%%%% dixhXou0-+#5.1cy\n";
    std::mt19937 random(7);
    size_t commands = 0;
    for (int round = 0; round < 20000; round++) {
        std::string format;
        for (unsigned n = random() % 12; n > 0; n--) {
            format += letters[random() % (sizeof letters - 1)];
        }
        const std::string bytes = made(format.c_str(), 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12);
        if (bytes != invalid) {
            const std::vector<std::string> words = read_back(bytes);
            commands++;
            if (words.empty() || words[0] == "broken" || wire(words) != bytes) {
                INFO(format);
                CHECK(bytes == "one command");
            }
        }
    }
    CHECK(commands > 2000);
}

TEST_CASE("format: a client sends commands from a format", "[format][client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    vkp_oneshot slot;
    vkp_reply *reply = nullptr;
    REQUIRE(vkp_client_commandf(client, &slot, "SET user:%d %b", 7, "a\0b", size_t(3)) == VKP_OK);
    CHECK(heard(loop, peer) == wire({"SET", "user:7", std::string("a\0b", 3)}));
    say(peer, "+OK\r\n");
    vkp_test_run_until(loop, "a reply",
                       [&] { return vkp_oneshot_try_recv(&slot, &reply) == VKP_OK; });
    CHECK(vkp_value_is_text(vkp_reply_get_value(reply), vkp_str_of("OK")));
    vkp_reply_unref(reply);

    REQUIRE(sent(client, &slot, "GET %s", "k") == VKP_OK);
    CHECK(heard(loop, peer) == wire({"GET", "k"}));
    vkp_oneshot_close(&slot);

    // More than the 64 arguments of vkp_client_command.
    std::string format = "DEL";
    std::vector<std::string> words = {"DEL"};
    for (int i = 0; i < 200; i++) {
        format += " k";
        words.emplace_back("k");
    }
    REQUIRE(vkp_client_commandf(client, &slot, format.c_str()) == VKP_OK);
    CHECK(heard(loop, peer) == wire(words));
    vkp_oneshot_close(&slot);
}

TEST_CASE("format: what a client refuses leaves a slot that is closed", "[format][client]")
{
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.queue_bytes = 600;
    Client client(loop, config);
    vkp_oneshot slot;
    vkp_reply *reply = nullptr;
    const auto is_closed = [&] {
        const vkp_status tried = vkp_oneshot_try_recv(&slot, &reply);
        vkp_oneshot_close(&slot);
        return tried == VKP_ERR_CLOSED;
    };
    CHECK(vkp_client_commandf(client, &slot, "GET %y") == VKP_ERR_INVALID);
    CHECK(is_closed());
    CHECK(vkp_client_commandf(client, &slot, " ") == VKP_ERR_INVALID);
    CHECK(is_closed());
    for (const char *format : {"SUBSCRIBE %s", "  psubscribe %s", "SELECT %s", "CLIENT REPLY %s"}) {
        INFO(format);
        CHECK(vkp_client_commandf(client, &slot, format, "x") == VKP_ERR_REFUSED);
        CHECK(is_closed());
    }
    CHECK(vkp_client_commandf(client, &slot, "%s%s x", "SUB", "SCRIBE") == VKP_ERR_REFUSED);
    CHECK(vkp_client_commandf(client, &slot, "CLIENT %b on", "REPLY", size_t(5)) ==
          VKP_ERR_REFUSED);
    const std::string big(400, 'x');
    Question first(client, {big.c_str()});
    CHECK(vkp_client_commandf(client, &slot, "%s", big.c_str()) == VKP_ERR_FULL);
    CHECK(is_closed());
    for (uint64_t nth = 1; nth <= 2; nth++) {
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_FROM, nth);
        const vkp_status starved = vkp_client_commandf(client, &slot, "PING");
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
        CHECK(starved == VKP_ERR_NOMEM);
        CHECK(is_closed());
    }
    CHECK(vkp_client_commandf(nullptr, &slot, "PING") == VKP_ERR_INVALID);
    CHECK(vkp_client_commandf(client, nullptr, "PING") == VKP_ERR_INVALID);
    CHECK(vkp_client_commandf(client, &slot, nullptr) == VKP_ERR_INVALID);
    vkp_client_close(client);
    CHECK(vkp_client_commandf(client, &slot, "PING") == VKP_ERR_CLOSED);
    CHECK(is_closed());
}
