// SPDX-License-Identifier: MIT
//
// A client that is opened with a URL: which address, user and password it stands for (on_connect
// sees them), what the client then sends, and which URLs are refused, with what in the log.
#include "support/catch.hpp"
#include "support/fake_server.h"

#include <cstdio>
#include <string>
#include <vector>

namespace {

vkp_str view(const std::string &text)
{
    return {text.data(), text.size()};
}

// What on_connect saw; then the target is the fake server.
struct Seen {
    const char *server = nullptr;
    std::string address;
    std::string username;
    std::string password;
};

std::string shown(vkp_str text)
{
    return text.ptr == nullptr ? "none" : std::string(vkp_test_view(text));
}

void redirect(void *user, vkp_client_target *target)
{
    auto *seen = static_cast<Seen *>(static_cast<vkp_test_client *>(user)->context);
    seen->address = shown(target->address);
    seen->username = shown(target->username);
    seen->password = shown(target->password);
    target->address = vkp_str_of(seen->server);
}

struct Row {
    const char *url;
    const char *address;
    const char *username;
    const char *password;
    std::vector<std::vector<std::string>> commands; // before the client is ready
};

const std::vector<std::string> hello = {"HELLO", "3"};
const std::vector<std::string> ping = {"PING"};

std::vector<std::string> hello_as(const std::string &user, const std::string &password)
{
    return {"HELLO", "3", "AUTH", user, password};
}

const std::vector<Row> &rows()
{
    static const std::vector<Row> all = {
        {"redis://h", "tcp:h:6379", "none", "none", {hello}},
        {"redis://h/", "tcp:h:6379", "none", "none", {hello}},
        {"redis://h:1", "tcp:h:1", "none", "none", {hello}},
        {"redis://h:65535/", "tcp:h:65535", "none", "none", {hello}},
        {"valkey://example.org:7", "tcp:example.org:7", "none", "none", {hello}},
        {"REDIS://h", "tcp:h:6379", "none", "none", {hello}},
        {"Valkey://H", "tcp:H:6379", "none", "none", {hello}},
        {"redis://h/0", "tcp:h:6379", "none", "none", {hello}},
        {"redis://h/3", "tcp:h:6379", "none", "none", {hello, {"SELECT", "3"}}},
        {"redis://h:1/015", "tcp:h:1", "none", "none", {hello, {"SELECT", "15"}}},
        {"redis://h/4294967295", "tcp:h:6379", "none", "none", {hello, {"SELECT", "4294967295"}}},
        {"redis://127.0.0.1:6380", "tcp:127.0.0.1:6380", "none", "none", {hello}},
        {"redis://[::1]", "tcp:[::1]:6379", "none", "none", {hello}},
        {"redis://[::1]:7/2", "tcp:[::1]:7", "none", "none", {hello, {"SELECT", "2"}}},
        {"redis://[fe80::1%25eth0]:7", "tcp:[fe80::1%eth0]:7", "none", "none", {hello}},
        {"redis://u:p@h", "tcp:h:6379", "u", "p", {hello_as("u", "p")}},
        {"redis://:p@h", "tcp:h:6379", "none", "p", {hello_as("default", "p")}},
        {"redis://u:@h", "tcp:h:6379", "u", "", {hello_as("u", "")}},
        {"redis://u:p@[::1]:7/1", "tcp:[::1]:7", "u", "p", {hello_as("u", "p"), {"SELECT", "1"}}},
        {"redis://a%40b:c%3Ad%2f%25@h", "tcp:h:6379", "a@b", "c:d/%", {hello_as("a@b", "c:d/%")}},
        {"redis://u:%00%20%ff@h", "tcp:h:6379", "u", nullptr, {}}, // the bytes: see below
        {"redis://u:a@b@h", "tcp:h:6379", "u", "a@b", {hello_as("u", "a@b")}},
        {"redis://u:a:b@h", "tcp:h:6379", "u", "a:b", {hello_as("u", "a:b")}},
        {"redis://u:a+b@h", "tcp:h:6379", "u", "a+b", {hello_as("u", "a+b")}},
        {"redis://h%2Dx", "tcp:h-x:6379", "none", "none", {hello}},
        {"redis://h?", "tcp:h:6379", "none", "none", {hello}},
        {"redis://h?protocol=3", "tcp:h:6379", "none", "none", {hello}},
        {"redis://h?protocol=2", "tcp:h:6379", "none", "none", {ping}},
        {"redis://h/5?protocol=2", "tcp:h:6379", "none", "none", {ping, {"SELECT", "5"}}},
        {"redis://u:p@h?protocol=2", "tcp:h:6379", "u", "p", {{"AUTH", "u", "p"}, ping}},
        {"redis://:p@h/?protocol=2", "tcp:h:6379", "none", "p", {{"AUTH", "p"}, ping}},
        {"unix:///run/v.sock", "unix:/run/v.sock", "none", "none", {hello}},
        {"unix:///v", "unix:/v", "none", "none", {hello}},
        {"UNIX:///v?db=4", "unix:/v", "none", "none", {hello, {"SELECT", "4"}}},
        {"unix:///v?db=0", "unix:/v", "none", "none", {hello}},
        {"unix:///v?db=4&protocol=2", "unix:/v", "none", "none", {ping, {"SELECT", "4"}}},
        {"unix:///v?protocol=3&db=4&", "unix:/v", "none", "none", {hello, {"SELECT", "4"}}},
        {"unix://u:p@/run/v", "unix:/run/v", "u", "p", {hello_as("u", "p")}},
        {"unix://:p@/run/v?db=1",
         "unix:/run/v",
         "none",
         "p",
         {hello_as("default", "p"), {"SELECT", "1"}}},
        {"unix:///a%20b%3F%23/@c:d", "unix:/a b?#/@c:d", "none", "none", {hello}},
    };
    return all;
}

struct Refused {
    const char *url;
    vkp_status status;
    const char *log;
};

const char *const unknown = "url: it begins with none of redis://, valkey://, unix://";
const char *const no_tls = "url: rediss:// is not supported: there is no TLS";
const char *const no_host = "url: there is no host";
const char *const bad_port =
    "url: the port is not a number up to 65535 (an IPv6 host needs brackets)";
const char *const no_end = "url: the brackets of the host do not end before the port";
const char *const brackets = "url: brackets are for IPv6 hosts, and only for them";
const char *const no_colon = "url: before the @ there is no colon, and so no password";
const char *const bad_secret =
    "url: a percent sign without two hexadecimal digits in the user or the password";
const char *const bad_host = "url: a percent sign without two hexadecimal digits in the host";
const char *const bad_path = "url: a percent sign without two hexadecimal digits in the path";
const char *const no_slash = "url: the path of the socket must begin with a slash";
const char *const bad_db = "url: the database behind the slash is not a number";
const char *const bad_db_key = "url: db must be a number, once";
const char *const bad_key = "url: a key other than protocol behind the ?";
const char *const bad_unix_key = "url: a key other than db and protocol behind the ?";
const char *const bad_protocol =
    "url: protocol must be 2 or 3, once, and not in the config as well";
const char *const fragment = "url: there is a #, which must be written as %23";

const Refused refused[] = {
    {"", VKP_ERR_INVALID, unknown},
    {"redis", VKP_ERR_INVALID, unknown},
    {"redis:/h", VKP_ERR_INVALID, unknown},
    {"redis:h:6379", VKP_ERR_INVALID, unknown},
    {"h:6379", VKP_ERR_INVALID, unknown},
    {"tcp:h:6379", VKP_ERR_INVALID, unknown},
    {"unix:/run/v", VKP_ERR_INVALID, unknown},
    {"http://h", VKP_ERR_INVALID, unknown},
    {" redis://h", VKP_ERR_INVALID, unknown},
    {"rediss://h", VKP_ERR_UNSUPPORTED, no_tls},
    {"RedisS://u:secret@h:1/2", VKP_ERR_UNSUPPORTED, no_tls},
    {"valkeys://h", VKP_ERR_UNSUPPORTED, no_tls},
    {"redis://", VKP_ERR_INVALID, no_host},
    {"redis:///", VKP_ERR_INVALID, no_host},
    {"redis:///1", VKP_ERR_INVALID, no_host},
    {"redis://:6379", VKP_ERR_INVALID, no_host},
    {"redis://u:secret@", VKP_ERR_INVALID, no_host},
    {"redis://u:secret@:1", VKP_ERR_INVALID, no_host},
    {"redis://?protocol=3", VKP_ERR_INVALID, no_host},
    {"redis://h:", VKP_ERR_INVALID, bad_port},
    {"redis://h:/1", VKP_ERR_INVALID, bad_port},
    {"redis://h:65536", VKP_ERR_INVALID, bad_port},
    {"redis://h:-1", VKP_ERR_INVALID, bad_port},
    {"redis://h:1x", VKP_ERR_INVALID, bad_port},
    {"redis://h: 1", VKP_ERR_INVALID, bad_port},
    {"redis://::1:6379", VKP_ERR_INVALID, no_host},
    {"redis://2001:db8::1", VKP_ERR_INVALID, bad_port},
    {"redis://u:sec/ret@h", VKP_ERR_INVALID, bad_port},
    {"redis://u:sec?ret@h", VKP_ERR_INVALID, bad_port},
    {"redis://[::1", VKP_ERR_INVALID, no_end},
    {"redis://[::1]6379", VKP_ERR_INVALID, no_end},
    {"redis://[::1]:", VKP_ERR_INVALID, bad_port},
    {"redis://[]", VKP_ERR_INVALID, brackets},
    {"redis://[h]:1", VKP_ERR_INVALID, brackets},
    {"redis://a%3Ab", VKP_ERR_INVALID, brackets},
    {"redis://secret@h", VKP_ERR_INVALID, no_colon},
    {"redis://@h", VKP_ERR_INVALID, no_colon},
    {"redis://u:%@h", VKP_ERR_INVALID, bad_secret},
    {"redis://u:%4@h", VKP_ERR_INVALID, bad_secret},
    {"redis://u:%4g@h", VKP_ERR_INVALID, bad_secret},
    {"redis://%zz:secret@h", VKP_ERR_INVALID, bad_secret},
    {"redis://h%", VKP_ERR_INVALID, bad_host},
    {"redis://[fe80::1%eth0]", VKP_ERR_INVALID, bad_host},
    {"redis://h/x", VKP_ERR_INVALID, bad_db},
    {"redis://h/-1", VKP_ERR_INVALID, bad_db},
    {"redis://h/1/", VKP_ERR_INVALID, bad_db},
    {"redis://h//", VKP_ERR_INVALID, bad_db},
    {"redis://h/4294967296", VKP_ERR_INVALID, bad_db},
    {"redis://h/99999999999999999999999", VKP_ERR_INVALID, bad_db},
    {"redis://h?db=1", VKP_ERR_INVALID, bad_key},
    {"redis://h?x", VKP_ERR_INVALID, bad_key},
    {"redis://h?PROTOCOL=3", VKP_ERR_INVALID, bad_key},
    {"redis://h?&protocol=3", VKP_ERR_INVALID, bad_key},
    {"redis://h?protocol", VKP_ERR_INVALID, bad_protocol},
    {"redis://h?protocol=", VKP_ERR_INVALID, bad_protocol},
    {"redis://h?protocol=1", VKP_ERR_INVALID, bad_protocol},
    {"redis://h?protocol=33", VKP_ERR_INVALID, bad_protocol},
    {"redis://h?protocol=3&protocol=3", VKP_ERR_INVALID, bad_protocol},
    {"redis://h#", VKP_ERR_INVALID, fragment},
    {"redis://u:se#cret@h", VKP_ERR_INVALID, fragment},
    {"unix://", VKP_ERR_INVALID, no_slash},
    {"unix://run/v", VKP_ERR_INVALID, no_slash},
    {"unix://u:secret@run/v", VKP_ERR_INVALID, no_slash},
    {"unix://u:secret@", VKP_ERR_INVALID, no_slash},
    {"unix://?db=1", VKP_ERR_INVALID, no_slash},
    {"unix:///v%2", VKP_ERR_INVALID, bad_path},
    {"unix:///v?db=", VKP_ERR_INVALID, bad_db_key},
    {"unix:///v?db", VKP_ERR_INVALID, bad_db_key},
    {"unix:///v?db=x", VKP_ERR_INVALID, bad_db_key},
    {"unix:///v?db=1&db=1", VKP_ERR_INVALID, bad_db_key},
    {"unix:///v?d=1", VKP_ERR_INVALID, bad_unix_key},
    {"unix:///v%00", VKP_ERR_INVALID, ""},
    {"unix:///a/../b", VKP_ERR_INVALID, ""},
};

// The answer that lets the handshake go on.
std::string answer_to(const std::string &command)
{
    return command.find("HELLO") != std::string::npos  ? hello_reply
           : command.find("PING") != std::string::npos ? "+PONG\r\n"
                                                       : "+OK\r\n";
}

vkp_status open_url(vkp_loop *loop, const std::string &url)
{
    vkp_client_config config = {};
    config.url = view(url);
    vkp_client *client = nullptr;
    const vkp_status status = vkp_client_open(loop, &config, &client);
    vkp_client_unref(client);
    return status;
}

} // namespace

TEST_CASE("url: address, credentials, database and protocol", "[client][url]")
{
    for (const Row &row : rows()) {
        INFO(row.url);
        Loop loop;
        FakeServer server;
        Seen seen;
        seen.server = server.address();
        vkp_client_config config = {};
        config.url = vkp_str_of(row.url);
        config.on_connect = redirect;
        Client client(loop, config, &seen);
        Peer peer = server.accept(loop);
        CHECK(seen.address == row.address);
        CHECK(seen.username == row.username);
        if (row.password == nullptr) {
            CHECK(seen.password == std::string("\0 \xff", 3));
            CHECK(heard(loop, peer) == wire(hello_as("u", std::string("\0 \xff", 3))));
            continue;
        }
        CHECK(seen.password == row.password);
        for (const auto &command : row.commands) {
            const std::string got = heard(loop, peer);
            CHECK(got == wire(command));
            say(peer, answer_to(got));
        }
        until_state(loop, client, VKP_CLIENT_READY);
        Question next(client, {"NEXT"});
        CHECK(heard(loop, peer) == wire({"NEXT"}));
    }
}

TEST_CASE("url: a Unix socket whose path has any bytes", "[client][url]")
{
    Loop loop;
    FakeServer server;
    std::string url = "unix://us%65r:p@";
    for (const char *at = server.address() + 5; *at != '\0'; at++) {
        char escaped[8];
        std::snprintf(escaped, sizeof escaped, "%%%02X", static_cast<unsigned char>(*at));
        url += *at == '/' ? std::string("/") : std::string(escaped);
    }
    vkp_client_config config = {};
    config.url = view(url);
    Client client(loop, config);
    url.assign(url.size(), 'x'); // copied
    Peer peer = server.accept(loop);
    CHECK(heard(loop, peer) == wire(hello_as("user", "p")));
    say(peer, hello_reply);
    until_state(loop, client, VKP_CLIENT_READY);
}

TEST_CASE("url: what is malformed is refused, and logged without the password", "[client][url]")
{
    for (const Refused &row : refused) {
        INFO(row.url);
        Loop loop;
        CHECK(open_url(loop, row.url) == row.status);
        CHECK((row.log[0] == '\0' || vkp_test_env_logged(&loop.test, row.log)));
        CHECK_FALSE(vkp_test_env_logged(&loop.test, "sec"));
    }
    Loop loop;
    CHECK(open_url(loop, "unix:///" + std::string(200, 'x')) == VKP_ERR_LIMIT);
    CHECK(open_url(loop, "redis://" + std::string(300, 'x')) == VKP_ERR_INVALID);
    CHECK(open_url(loop, std::string("redis://h\0", 10)) == VKP_ERR_INVALID);
}

TEST_CASE("url: the fields that it stands for must be unset", "[client][url]")
{
    Loop loop;
    vkp_client *client = nullptr;
    vkp_client_config config = {};
    const auto opened = [&](void (*change)(vkp_client_config &)) {
        config = {};
        config.url = vkp_str_of("unix:///nowhere/v");
        change(config);
        return vkp_client_open(loop, &config, &client);
    };
    CHECK(opened([](vkp_client_config &c) { c.address = vkp_str_of("unix:/nowhere/v"); }) ==
          VKP_ERR_INVALID);
    CHECK(opened([](vkp_client_config &c) { c.username = vkp_str_of("u"); }) == VKP_ERR_INVALID);
    CHECK(opened([](vkp_client_config &c) { c.password = vkp_str_of("p"); }) == VKP_ERR_INVALID);
    CHECK(opened([](vkp_client_config &c) { c.database = 1; }) == VKP_ERR_INVALID);
    CHECK(opened([](vkp_client_config &c) {
              c.protocol = 3;
              c.url = vkp_str_of("unix:///nowhere/v?protocol=3");
          }) == VKP_ERR_INVALID);
    CHECK(opened([](vkp_client_config &c) { c.url = vkp_str{nullptr, 0}; }) == VKP_ERR_INVALID);
    REQUIRE(client == nullptr);
    // The config's own protocol, where the URL has none.
    REQUIRE(opened([](vkp_client_config &c) { c.protocol = 2; }) == VKP_OK);
    vkp_client_unref(client);
}

TEST_CASE("url: without memory at any point nothing is left", "[client][url]")
{
    Loop loop;
    bool opened = false;
    for (uint64_t nth = 1; !opened; nth++) {
        REQUIRE(nth < 50);
        const size_t before = vkp_test_env_live_blocks(&loop.test);
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_FROM, nth);
        const vkp_status status = open_url(loop, "redis://user:password@127.0.0.1:1/2");
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
        opened = status == VKP_OK;
        if (!opened) {
            CHECK(status == VKP_ERR_NOMEM);
            CHECK(vkp_test_env_live_blocks(&loop.test) == before);
        }
    }
}

TEST_CASE("url: random URLs are opened or refused", "[client][url]")
{
    // Pieces, so that many are nearly right.
    const char *const pieces[] = {"redis://", "unix://", "valkey://", "u",  ":",  "p", "@",
                                  "h",        "[",       "::1",       "]",  "/",  "1", "?",
                                  "db=",      "&",       "protocol=", "%2", "0f", "#", "%"};
    Loop loop;
    uint64_t state = 88172645463325252u;
    size_t opened = 0;
    for (int round = 0; round < 20000; round++) {
        std::string url;
        const auto next = [&] {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            return state;
        };
        url = pieces[next() % 3];
        for (uint64_t n = next() % 8; n > 0; n--) {
            url += pieces[next() % (sizeof pieces / sizeof pieces[0])];
        }
        const vkp_status status = open_url(loop, url);
        opened += status == VKP_OK ? 1 : 0;
        if (status != VKP_OK && status != VKP_ERR_INVALID) {
            INFO(url);
            CHECK(status == VKP_OK);
        }
    }
    CHECK(opened > 500);
}

TEST_CASE("url: a real server", "[client][url]")
{
    if (!vkp_test_server_program()) {
        WARN("neither valkey-server nor redis-server is on PATH: not tested");
        return;
    }
    const char *const options[] = {"--requirepass", "p:@/ s", nullptr};
    vkp_test_server *server = vkp_test_server_open(options);
    {
        Loop loop;
        const std::string tcp = vkp_test_server_tcp(server);
        const std::string url = "redis://:p%3A%40%2F%20s@" + tcp.substr(4) + "/7";
        vkp_client_config config = {};
        config.url = view(url);
        Client client(loop, config);
        until_state(loop, client, VKP_CLIENT_READY);
        Question info(client, {"CLIENT", "INFO"});
        CHECK(info.text_on(loop).find(" db=7 ") != std::string::npos);
    }
    vkp_test_server_close(server);
}
