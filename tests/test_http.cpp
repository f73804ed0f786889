// SPDX-License-Identifier: MIT
//
// HTTP: what a request is and what refuses it; a server of pages over every backend: pipelines,
// bytes one at a time, slow and silent peers, limits, no memory, no descriptors, drains.
#include "support/catch.hpp"

#include <cerrno>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "support/client_probe.h"
#include "support/listener_probe.h"

namespace {

using Strings = std::vector<std::string>;

// ---- the reader ----

struct Read {
    vkp_status status = VKP_ERR_INVALID;
    vkp_http_request request = {};
    size_t used = 0;
    int code = 0;
};

Read read_request(const std::string &text)
{
    Read read;
    read.status = vkp_http_read(reinterpret_cast<const uint8_t *>(text.data()), text.size(),
                                &read.request, &read.used, &read.code);
    return read;
}

std::string text_of(vkp_str view)
{
    return view.ptr != nullptr ? std::string(view.ptr, view.len) : "(none)";
}

const std::string host = "Host: localhost\r\n";

std::string get(const std::string &target, const std::string &fields = host)
{
    return "GET " + target + " HTTP/1.1\r\n" + fields + "\r\n";
}

} // namespace

TEST_CASE("http: a request has method, path, query, host and fields")
{
    const std::string text = "GET /a/b%20c?x=1&y=? HTTP/1.1\r\nhOST: example.org:80\r\n"
                             "X-Empty:\r\nX-Twice: \t one \t\r\nx-twice: two\r\n\r\nGET";
    const Read read = read_request(text);
    REQUIRE(read.status == VKP_OK);
    CHECK(read.used == text.size() - 3);
    CHECK(text_of(read.request.method) == "GET");
    CHECK(text_of(read.request.path) == "/a/b%20c");
    CHECK(text_of(read.request.query) == "x=1&y=?");
    CHECK(text_of(read.request.host) == "example.org:80");
    CHECK(text_of(vkp_http_get_field(&read.request, "HOST")) == "example.org:80");
    CHECK(text_of(vkp_http_get_field(&read.request, "X-Empty")) == "");
    CHECK(text_of(vkp_http_get_field(&read.request, "X-Twice")) == "one");
    CHECK(text_of(vkp_http_get_field(&read.request, "X-Twic")) == "(none)");
    CHECK(read.request.keep_alive);
    CHECK_FALSE(read.request.has_body);
}

TEST_CASE("http: forms of a target")
{
    struct Row {
        const char *line, *path, *query, *host;
    };
    const Row row = GENERATE(Row{"GET / HTTP/1.1", "/", "(none)", "localhost"},
                             Row{"GET /? HTTP/1.1", "/", "", "localhost"},
                             Row{"GET //x HTTP/1.1", "//x", "(none)", "localhost"},
                             Row{"GET http://a.b:8/c?d HTTP/1.1", "/c", "d", "a.b:8"},
                             Row{"GET HTTP://[::1] HTTP/1.1", "/", "(none)", "[::1]"},
                             Row{"GET https://a?d HTTP/1.1", "/", "d", "a"},
                             Row{"OPTIONS * HTTP/1.1", "*", "(none)", "localhost"},
                             Row{"CONNECT a.b:443 HTTP/1.1", "a.b:443", "(none)", "localhost"},
                             Row{"GET / HTTP/1.7", "/", "(none)", "localhost"},
                             Row{"!#$%&'*+-.^_`|~09azAZ / HTTP/1.1", "/", "(none)", "localhost"});
    INFO(row.line);
    const std::string text = std::string(row.line) + "\r\n" + host + "\r\n";
    const Read read = read_request(text);
    REQUIRE(read.status == VKP_OK);
    CHECK(text_of(read.request.path) == row.path);
    CHECK(text_of(read.request.query) == row.query);
    CHECK(text_of(read.request.host) == row.host);
}

TEST_CASE("http: which connections stay, and which requests have a body")
{
    struct Row {
        const char *version, *fields;
        bool keep_alive, has_body;
    };
    const Row row =
        GENERATE(Row{"1.1", "", true, false}, Row{"1.1", "Connection: close\r\n", false, false},
                 Row{"1.1", "Connection: foo ,\tCLOSE, bar\r\n", false, false},
                 Row{"1.1", "Connection: closed\r\n", true, false}, Row{"1.0", "", false, false},
                 Row{"1.0", "Connection: Keep-Alive\r\n", true, false},
                 Row{"1.0", "Connection: close\r\nConnection: keep-alive\r\n", false, false},
                 Row{"1.1", "Content-Length: 000\r\n", true, false},
                 Row{"1.1", "Content-Length: 010\r\n", true, true},
                 Row{"1.1", "Transfer-Encoding: chunked\r\n", true, true});
    INFO(row.version << " " << row.fields);
    const Read read = read_request(std::string("GET / HTTP/") + row.version + "\r\nHost: h\r\n" +
                                   row.fields + "\r\n");
    REQUIRE(read.status == VKP_OK);
    CHECK(read.request.keep_alive == row.keep_alive);
    CHECK(read.request.has_body == row.has_body);
    CHECK(text_of(read_request("GET / HTTP/1.0\r\n\r\n").request.host) == "(none)");
}

TEST_CASE("http: what is not a request is refused with its status, as soon as it is whole")
{
    struct Row {
        std::string text;
        int code;
    };
    const Row row = GENERATE(
        Row{"\x16\x03\x01\x02", 400}, Row{"*1\r\n$4\r\nPING\r\n", 400},
        Row{" GET / HTTP/1.1\r\n", 400}, Row{"GET\t/ HTTP/1.1\r\n", 400}, Row{"GET /\r\n", 400},
        Row{"GET  / HTTP/1.1\r\n", 400}, Row{"GET / HTTP/1.1 \r\n", 400},
        Row{"GET / HTTP/1.1\n", 400}, Row{"GET / http/1.1\r\n", 400}, Row{"GET / HTTP/11\r\n", 400},
        Row{"GET / HTTP/1.x\r\n", 400}, Row{"GET x HTTP/1.1\r\n", 400},
        Row{"GET * HTTP/1.1\r\n", 400}, Row{"GET /a#b HTTP/1.1\r\n", 400},
        Row{"GET /\x80 HTTP/1.1\r\n", 400}, Row{std::string("GET /\0 HTTP/1.1\r\n", 17), 400},
        Row{"GET /a\rb HTTP/1.1\r\n", 400}, Row{"GET http:/h HTTP/1.1\r\n", 400},
        Row{"GET http:///x HTTP/1.1\r\n", 400}, Row{"GET ftp://h/ HTTP/1.1\r\n", 400},
        Row{"GET http://u@h/ HTTP/1.1\r\n", 400}, Row{"\r\n\r\n\r\n\r\n\r\n", 400},
        Row{"PRI * HTTP/2.0\r\n", 505}, Row{"GET / HTTP/0.9\r\n", 505},
        Row{std::string(33, 'A') + " / HTTP/1.1\r\n", 501}, Row{std::string(33, 'A'), 501},
        Row{get("/", ""), 400}, Row{get("/", host + host), 400},
        Row{get("/", "Host: a b\r\n"), 400}, Row{get("/", "Host: a/b\r\n"), 400},
        Row{get("/", "Host: a@b\r\n"), 400}, Row{"GET / HTTP/1.1\r\nHost : h\r\n", 400},
        Row{"GET / HTTP/1.1\r\n Host: h\r\n", 400},
        Row{"GET / HTTP/1.1\r\nHost: h\r\n folded\r\n", 400}, Row{"GET / HTTP/1.1\r\n: x\r\n", 400},
        Row{"GET / HTTP/1.1\r\nnothing\r\n", 400}, Row{"GET / HTTP/1.1\r\nX: a\rb\r\n", 400},
        Row{"GET / HTTP/1.1\r\nX: a\nY: b\r\n", 400}, Row{"GET / HTTP/1.1\r\nX: \x7f\r\n", 400},
        Row{"GET / HTTP/1.1\r\nH\xf6st: h\r\n", 400},
        Row{"GET / HTTP/1.1\r\nContent-Length: +1\r\n", 400},
        Row{"GET / HTTP/1.1\r\nContent-Length:\r\n", 400},
        Row{"GET / HTTP/1.1\r\nContent-Length: 1, 1\r\n", 400},
        Row{"GET / HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: 0\r\n", 400},
        Row{get("/", host + "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n"), 400},
        Row{"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400});
    INFO(row.text);
    const Read whole = read_request(row.text);
    CHECK(whole.status == VKP_ERR_PROTOCOL);
    CHECK(whole.code == row.code);
    for (size_t len = 0; len < row.text.size(); len++) {
        const Read part = read_request(row.text.substr(0, len));
        if (part.status != VKP_ERR_EMPTY) {
            CHECK(part.status == VKP_ERR_PROTOCOL);
            CHECK(part.code == row.code);
        }
    }
}

TEST_CASE("http: a part of a request is incomplete, whatever its length")
{
    const std::string text =
        GENERATE(as<std::string>{}, "\r\n\r\nGET /x?y HTTP/1.1\r\nHost: h\r\nX-Y:  z\xfc \r\n\r\n",
                 "HEAD http://[::1]:80/ HTTP/1.0\r\n\r\n", "OPTIONS * HTTP/1.1\r\nhost:\r\n\r\n");
    for (size_t len = 0; len < text.size(); len++) {
        INFO(len);
        CHECK(read_request(text.substr(0, len)).status == VKP_ERR_EMPTY);
    }
    CHECK(read_request(text).status == VKP_OK);
    CHECK(read_request(text).used == text.size());
}

TEST_CASE("http: limits are limits, to the byte")
{
    const auto line = [](size_t bytes) { return get("/" + std::string(bytes - 16, 'x')); };
    CHECK(read_request(line(VKP_HTTP_LINE_BYTES)).status == VKP_OK);
    CHECK(read_request(line(VKP_HTTP_LINE_BYTES + 1)).code == 414);
    CHECK(read_request(line(VKP_HTTP_LINE_BYTES + 9).substr(0, VKP_HTTP_LINE_BYTES)).code == 414);
    CHECK(read_request(line(VKP_HTTP_LINE_BYTES + 9).substr(0, VKP_HTTP_LINE_BYTES - 1)).status ==
          VKP_ERR_EMPTY);
    // With the empty line behind them.
    const auto fields = [](size_t bytes) {
        return get("/", host + "X: " + std::string(bytes - host.size() - 7, 'x') + "\r\n");
    };
    CHECK(read_request(fields(VKP_HTTP_FIELDS_BYTES)).status == VKP_OK);
    CHECK(read_request(fields(VKP_HTTP_FIELDS_BYTES + 1)).code == 431);
    const auto many = [](size_t count) {
        std::string text = host;
        for (size_t i = 1; i < count; i++) {
            text += "X:\r\n";
        }
        return get("/", text);
    };
    CHECK(read_request(many(VKP_HTTP_FIELDS)).status == VKP_OK);
    CHECK(read_request(many(VKP_HTTP_FIELDS + 1)).code == 431);
}

TEST_CASE("http: a reader without its arguments is INVALID")
{
    vkp_http_request request;
    size_t used = 0;
    int code = 0;
    const uint8_t byte = 'G';
    CHECK(vkp_http_read(nullptr, 0, &request, &used, &code) == VKP_ERR_EMPTY);
    CHECK(vkp_http_read(nullptr, 1, &request, &used, &code) == VKP_ERR_INVALID);
    CHECK(vkp_http_read(&byte, 1, nullptr, &used, &code) == VKP_ERR_INVALID);
    CHECK(vkp_http_read(&byte, 1, &request, nullptr, &code) == VKP_ERR_INVALID);
    CHECK(vkp_http_read(&byte, 1, &request, &used, nullptr) == VKP_ERR_INVALID);
}

// ---- the server ----

namespace {

struct Answer {
    int status = 0;
    std::map<std::string, std::string> fields;
    std::string body;
};

// A client that this thread runs beside the server's loop.
class Browser {
  public:
    Browser(vkp_loop *loop, const std::string &address)
        : loop_(loop), fd_(vkp_test_connect(address.c_str()))
    {
        if (fd_ < 0) {
            vkp_test_fail("no connection to %s", address.c_str());
        }
        (void)fcntl(fd_, F_SETFL, O_NONBLOCK);
    }
    ~Browser()
    {
        close(fd_);
    }
    Browser(const Browser &) = delete;
    Browser &operator=(const Browser &) = delete;
    // Sends it all, while the loop runs.
    void send(const std::string &text)
    {
        size_t at = 0;
        vkp_test_run_until(loop_, "room to send", [&] {
            const ssize_t put = ::send(fd_, text.data() + at, text.size() - at, MSG_NOSIGNAL);
            at += put > 0 ? static_cast<size_t>(put) : 0;
            return at == text.size() || (put < 0 && errno != EAGAIN);
        });
    }
    void send_end()
    {
        REQUIRE(shutdown(fd_, SHUT_WR) == 0);
    }
    // What came so far.
    void read_some()
    {
        char buffer[65536];
        ssize_t got = 1;
        while (got > 0) {
            got = recv(fd_, buffer, sizeof buffer, 0);
            text.append(buffer, got > 0 ? static_cast<size_t>(got) : 0);
            ended = ended || got == 0 || (got < 0 && errno != EAGAIN);
        }
    }
    // The next answer; status 0: the connection ended before. head: it has no body.
    Answer next(bool head = false)
    {
        Answer answer;
        vkp_test_run_until(loop_, "an answer", [&] {
            read_some();
            return take(&answer, head) || ended;
        });
        return answer;
    }
    Answer ask(const std::string &request, bool head = false)
    {
        send(request);
        return next(head);
    }
    void wait_end()
    {
        vkp_test_run_until(loop_, "the end", [&] {
            read_some();
            return ended;
        });
    }
    int fd() const
    {
        return fd_;
    }

    std::string text;
    bool ended = false;

  private:
    bool take(Answer *answer, bool head)
    {
        const size_t end = text.find("\r\n\r\n");
        if (end == std::string::npos) {
            return false;
        }
        Answer found;
        size_t at = text.find("\r\n") + 2;
        found.status = std::stoi(text.substr(9, 3));
        while (at < end + 2) {
            const size_t colon = text.find(": ", at);
            const size_t stop = text.find("\r\n", at);
            found.fields[text.substr(at, colon - at)] = text.substr(colon + 2, stop - colon - 2);
            at = stop + 2;
        }
        const size_t len = head ? 0 : std::stoul(found.fields["Content-Length"]);
        if (text.size() < end + 4 + len) {
            return false;
        }
        found.body = text.substr(end + 4, len);
        text.erase(0, end + 4 + len);
        *answer = found;
        return true;
    }
    vkp_loop *loop_;
    int fd_;
};

// A server whose page is what was asked for.
struct Site {
    vkp_http *http = nullptr;
    vkp_http_config config = {};
    Strings asked;
    std::vector<vkp_http_call *> held;
    std::function<void(vkp_http_call *)> hook;
    bool hold = false;

    explicit Site(vkp_loop *loop, const std::string &address = "tcp:127.0.0.1:0",
                  const std::function<void(vkp_http_config *)> &change = nullptr)
    {
        config.address = vkp_str_of(address.c_str());
        config.user = this;
        config.on_request = [](void *user, const vkp_http_request *request, vkp_http_call *call) {
            static_cast<Site *>(user)->take(request, call);
        };
        if (change) {
            change(&config);
        }
        if (vkp_http_open(loop, &config, &http) != VKP_OK) {
            vkp_test_fail("no server");
        }
    }
    ~Site()
    {
        vkp_http_unref(http);
        answer_all();
    }
    Site(const Site &) = delete;
    Site &operator=(const Site &) = delete;
    std::string address() const
    {
        return vkp_http_get_address(http);
    }
    void take(const vkp_http_request *request, vkp_http_call *call)
    {
        asked.push_back(text_of(request->path));
        if (hook) {
            hook(call);
        }
        if (hold) {
            held.push_back(call);
            return;
        }
        answer(call, asked.back());
    }
    static void answer(vkp_http_call *call, const std::string &path)
    {
        vkp_http_response response = {};
        const std::string text =
            path == "/large" ? std::string(200000, 'L') : "you asked for " + path;
        response.status = path == "/missing" ? 404 : 0;
        response.type = path == "/html" ? "text/html" : nullptr;
        response.fields = path == "/html" ? "X-Frame-Options: DENY\r\n" : nullptr;
        if (response.status == 0 &&
            vkp_bytes_copy(nullptr, text.data(), text.size(), &response.body) != VKP_OK) {
            vkp_test_fail("no memory for a page");
        }
        vkp_http_answer(call, &response);
        vkp_bytes_unref(&response.body);
    }
    void answer_all()
    {
        while (!held.empty()) {
            vkp_http_call *call = held.back();
            held.pop_back();
            answer(call, "/late");
        }
    }
};

std::string page(const std::string &path)
{
    return "you asked for " + path;
}

} // namespace

TEST_CASE("http: pages, one after the other on one connection")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    const bool tcp = GENERATE(true, false);
    Site site(loop, tcp ? "tcp:127.0.0.1:0" : vkp_test_fresh_address("http"));
    Browser browser(loop, site.address());
    Answer answer = browser.ask(get("/a?b"));
    CHECK(answer.status == 200);
    CHECK(answer.body == page("/a"));
    CHECK(answer.fields["Content-Type"] == "text/plain; charset=utf-8");
    CHECK(answer.fields["Connection"] == "keep-alive");
    CHECK(answer.fields["Cache-Control"] == "no-store");
    CHECK(answer.fields["X-Content-Type-Options"] == "nosniff");
    answer = browser.ask(get("/html"));
    CHECK(answer.fields["Content-Type"] == "text/html");
    CHECK(answer.fields["X-Frame-Options"] == "DENY");
    answer = browser.ask(get("/missing"));
    CHECK(answer.status == 404);
    CHECK(answer.body == "Not Found\n");
    answer = browser.ask("HEAD /a HTTP/1.1\r\nHost: localhost\r\n\r\n", true);
    CHECK(answer.status == 200);
    CHECK(answer.fields["Content-Length"] == std::to_string(page("/a").size()));
    CHECK((browser.ask(get("/large")).body == std::string(200000, 'L')));
    answer = browser.ask("GET /a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    CHECK(answer.fields["Connection"] == "close");
    browser.wait_end();
    CHECK(browser.text.empty());
}

TEST_CASE("http: a client of HTTP/1.0, and one that sends nothing more")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    Site site(loop);
    {
        Browser browser(loop, site.address());
        CHECK(browser.ask("GET /a HTTP/1.0\r\n\r\n").body == page("/a"));
        browser.wait_end();
    }
    {
        Browser browser(loop, site.address());
        browser.send("GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + get("/b"));
        browser.send_end();
        CHECK(browser.next().fields["Connection"] == "keep-alive");
        CHECK(browser.next().body == page("/b"));
        browser.wait_end();
    }
    site.hold = true; // answered behind the end
    {
        Browser browser(loop, site.address());
        browser.send(get("/a"));
        browser.send_end();
        vkp_test_run_until(loop, "a call", [&] { return site.held.size() == 1; });
        site.answer_all();
        CHECK(browser.next().body == page("/late"));
        browser.wait_end();
    }
}

TEST_CASE("http: what is refused is answered, and the connection ends")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    Site site(loop);
    struct Row {
        std::string text;
        int code;
    };
    const Row row =
        GENERATE(Row{"NONSENSE\r\n", 400}, Row{"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n", 405},
                 Row{"PUT / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello", 405},
                 Row{"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 405},
                 Row{"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 405},
                 Row{get("/", "Host: localhost\r\nContent-Length: 9\r\n") + "GET / HTTP", 413},
                 Row{get("/" + std::string(9000, 'x')), 414},
                 Row{get("/", "Host: localhost\r\nX: " + std::string(100000, 'x') + "\r\n"), 431},
                 Row{"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505});
    INFO(row.text.substr(0, 60));
    Browser browser(loop, site.address());
    browser.send("GET /first HTTP/1.1\r\nHost: localhost\r\n\r\n" + row.text);
    CHECK(browser.next().body == page("/first"));
    Answer answer = browser.next();
    CHECK(answer.status == row.code);
    CHECK(answer.fields["Connection"] == "close");
    CHECK(answer.fields["Allow"] == (row.code == 405 ? "GET, HEAD" : ""));
    browser.wait_end();
    CHECK(browser.text.empty());
    CHECK(site.asked == Strings{"/first"});
}

TEST_CASE("http: pipelined requests, in pieces of any length, are answered in their order")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    Site site(loop, vkp_test_fresh_address("http")); // TCP waits before it sends pieces
    site.hold = GENERATE(false, true);
    const std::string text = "\r\n" + get("/one", "Host: localhost\r\n") +
                             "HEAD /two HTTP/1.1\r\nHost: [::1]:80\r\n\r\n" +
                             get("/missing", "Host: 127.0.0.1\r\n");
    for (size_t piece = 1; piece <= text.size(); piece = piece < 4 ? piece + 1 : piece * 3) {
        Browser browser(loop, site.address());
        INFO("pieces of " << piece << ", held " << site.hold);
        site.asked.clear();
        for (size_t at = 0; at < text.size(); at += piece) {
            browser.send(text.substr(at, piece));
            vkp_test_rounds(loop, piece == 1 ? 2 : 1);
        }
        for (int i = 0; i < 3; i++) {
            if (site.hold) {
                vkp_test_run_until(loop, "a call", [&] { return site.held.size() == 1; });
                vkp_test_rounds(loop, 2);
                CHECK(site.held.size() == 1); // one at a time
                Site::answer(std::exchange(site.held, {}).front(), site.asked.back());
            }
            const Answer answer = browser.next(i == 1);
            CHECK(answer.status == (i == 2 ? 404 : 200));
            CHECK(answer.body == (i == 0 ? page("/one") : i == 1 ? "" : "Not Found\n"));
        }
        CHECK(site.asked == Strings{"/one", "/two", "/missing"});
    }
}

TEST_CASE("http: the page of a stranger that resolves to this machine gets nothing")
{
    struct Row {
        const char *address, *host;
        bool any, right;
    };
    const Row row = GENERATE(
        Row{"tcp:127.0.0.1:0", "127.0.0.1", false, true},
        Row{"tcp:127.0.0.1:0", "localhost", false, true},
        Row{"tcp:127.0.0.1:0", "LOCALHOST:8080", false, true},
        Row{"tcp:127.0.0.1:0", "x.localhost", false, true},
        Row{"tcp:127.0.0.1:0", "[::1]:9", false, true}, Row{"tcp:127.0.0.1:0", "", false, true},
        Row{"tcp:127.0.0.1:0", "evil.example", false, false},
        Row{"tcp:127.0.0.1:0", "127.0.0.1.evil.example:80", false, false},
        Row{"tcp:127.0.0.1:0", "notlocalhost", false, false},
        Row{"tcp:127.0.0.1:0", "localhost.evil.example", false, false},
        Row{"tcp:127.0.0.1:0", "evil.example", true, true},
        Row{"tcp:localhost:0", "localhost", false, true}, Row{"unix", "evil.example", false, true});
    INFO(row.address << " " << row.host);
    vkp_test_loop loop;
    Site site(loop,
              std::string(row.address) == "unix" ? vkp_test_fresh_address("http") : row.address,
              [&](vkp_http_config *config) { config->any_host = row.any; });
    Browser browser(loop, site.address());
    const std::string line = std::string("Host: ") + row.host + "\r\n";
    CHECK(browser.ask(get("/", line)).status == (row.right ? 200 : 421));
    CHECK(site.asked.size() == (row.right ? 1 : 0));
    if (row.right) { // the target's host counts, not the field
        CHECK(browser.ask(get("http://evil.example/", "Host: localhost\r\n")).status ==
              (row.any || std::string(row.address) == "unix" ? 200 : 421));
    }
}

TEST_CASE("http: the name that the server was opened with is its own")
{
    vkp_sys sys = *vkp_sys_get_default();
    sys.resolve = [](const char *, const char *port, vkp_address *out, size_t capacity) {
        return vkp_sys_get_default()->resolve("127.0.0.1", port, out, capacity);
    };
    vkp_test_loop loop(*vkp_test_backends(), &sys);
    Site site(loop, "tcp:relay.example:0");
    const std::string port = site.address().substr(site.address().rfind(':'));
    Browser browser(loop, "tcp:127.0.0.1" + port);
    CHECK(browser.ask(get("/", "Host: RELAY.example" + port + "\r\n")).status == 200);
    CHECK(browser.ask(get("/", "Host: example\r\n")).status == 421);
}

TEST_CASE("http: the date of an answer")
{
    static uint64_t seconds;
    vkp_sys sys = *vkp_sys_get_default();
    sys.wall_ns = [] { return seconds * 1000000000u; };
    vkp_test_loop loop(&vkp_backend_null, &sys);
    Site site(loop);
    Browser browser(loop, site.address());
    const std::pair<uint64_t, const char *> rows[] = {
        {0, "Thu, 01 Jan 1970 00:00:00 GMT"},
        {784111777, "Sun, 06 Nov 1994 08:49:37 GMT"},
        {951827696, "Tue, 29 Feb 2000 12:34:56 GMT"},
        {951868800, "Wed, 01 Mar 2000 00:00:00 GMT"},
        {1798761599, "Thu, 31 Dec 2026 23:59:59 GMT"},
        {4107542400, "Mon, 01 Mar 2100 00:00:00 GMT"}};
    for (const auto &row : rows) {
        seconds = row.first;
        CHECK(browser.ask(get("/")).fields["Date"] == row.second);
    }
}

TEST_CASE("http: a client that does not read is not read, and holds no more than its share")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    Site site(loop, vkp_test_fresh_address("http"));
    Browser browser(loop, site.address());
    const int requests = 100;
    std::string text;
    for (int i = 0; i < requests; i++) {
        text += get("/large");
    }
    browser.send(text);
    vkp_test_rounds(loop, 50);
    CHECK(site.asked.size() < 10); // two in the kernel, one in the outbox
    CHECK(vkp_test_env_live_bytes(&loop.test) < 1000000);
    for (int i = 0; i < requests; i++) {
        REQUIRE(browser.next().body.size() == 200000);
    }
    CHECK(browser.ask(get("/")).status == 200);
}

TEST_CASE("http: whoever is silent, slow or does not read, goes in time")
{
    vkp_test_loop loop(&vkp_backend_null);
    Site site(loop, vkp_test_fresh_address("http"),
              [](vkp_http_config *config) { config->timeout_ms = 500; });
    Browser browser(loop, site.address());
    const uint64_t from = loop.now();
    const uint64_t most = 500 * vkp_test_ms;
    uint64_t since = from;
    SECTION("says nothing")
    {
    }
    SECTION("was answered, and says nothing more")
    {
        loop.round(from + 100 * vkp_test_ms);
        CHECK(browser.ask(get("/")).status == 200);
        since = loop.now();
    }
    SECTION("one byte after the other")
    {
        for (int i = 0; i < 4; i++) {
            loop.round(from + static_cast<uint64_t>(i) * 100 * vkp_test_ms);
            browser.send("G");
        }
    }
    SECTION("does not read")
    {
        browser.send(get("/large") + get("/large") + get("/large"));
        vkp_test_rounds(loop, 20);
    }
    size_t rounds = 0;
    while (loop.now() < since + most && rounds++ < 100) {
        loop.round(since + most);
    }
    CHECK(loop.now() == since + most);
    vkp_test_rounds(loop, 3);
    browser.wait_end();
    CHECK(loop.now() == since + most);
}

TEST_CASE("http: while the program works on an answer, time does not count")
{
    vkp_test_loop loop(&vkp_backend_null);
    Site site(loop);
    site.hold = true;
    Browser browser(loop, site.address());
    browser.send(get("/"));
    vkp_test_run_until(loop, "a call", [&] { return site.held.size() == 1; });
    loop.round(loop.now() + 60000 * vkp_test_ms);
    browser.read_some();
    CHECK_FALSE(browser.ended);
    site.answer_all();
    CHECK(browser.next().body == page("/late"));
}

TEST_CASE("http: more clients than allowed get 503, and a place that is free is given again")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    Site site(loop, "tcp:127.0.0.1:0", [](vkp_http_config *config) { config->max_clients = 2; });
    Browser first(loop, site.address());
    CHECK(first.ask(get("/")).status == 200);
    auto second = std::make_unique<Browser>(loop, site.address());
    CHECK(second->ask(get("/")).status == 200);
    Browser third(loop, site.address());
    Answer answer = third.next();
    CHECK(answer.status == 503);
    CHECK(answer.fields["Retry-After"] == "1");
    third.wait_end();
    second.reset();
    vkp_test_rounds(loop, 10);
    Browser fourth(loop, site.address());
    CHECK(fourth.ask(get("/")).status == 200);
}

TEST_CASE("http: without descriptors clients wait, and are served later")
{
    static int failures;
    vkp_sys sys = *vkp_sys_get_default();
    sys.accept = [](int fd) {
        return failures > 0 ? (failures--, -EMFILE) : vkp_sys_get_default()->accept(fd);
    };
    failures = 3;
    vkp_test_loop loop(*vkp_test_backends(), &sys);
    Site site(loop);
    Browser browser(loop, site.address());
    CHECK(browser.ask(get("/")).status == 200);
    CHECK(failures == 0);
}

TEST_CASE("http: no memory costs an answer or a connection, nothing else")
{
    for (uint64_t k = 1;; k++) {
        INFO("allocation " << k);
        vkp_test_loop loop(&vkp_backend_null);
        Site site(loop, vkp_test_fresh_address("http"));
        const uint64_t failures = vkp_test_env_failures(&loop.test);
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_ONCE, k);
        {
            Browser browser(loop, site.address());
            browser.send("GET /a HTTP/1.1\r\nHo");
            browser.send("st: localhost\r\n\r\n" + get("/b"));
            browser.send_end();
            browser.wait_end();
        }
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
        Browser browser(loop, site.address());
        CHECK(browser.ask(get("/")).status == 200);
        if (vkp_test_env_failures(&loop.test) == failures) {
            CHECK(k > 8);
            break;
        }
    }
    for (uint64_t k = 1;; k++) {
        INFO("allocation " << k << " of open");
        vkp_test_loop loop(&vkp_backend_null);
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_ONCE, k);
        const std::string address = vkp_test_fresh_address("http");
        vkp_http_config config = {};
        config.address = vkp_str_of(address.c_str());
        config.on_request = [](void *, const vkp_http_request *, vkp_http_call *) {};
        vkp_http *http = nullptr;
        const vkp_status status = vkp_http_open(loop, &config, &http);
        vkp_http_unref(http);
        if (status == VKP_OK) {
            CHECK(k > 3);
            break;
        }
        CHECK(status == VKP_ERR_NOMEM);
        CHECK(http == nullptr);
    }
}

TEST_CASE("http: a client that goes before its answer, and a server that goes before it")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    Site site(loop);
    site.hold = true;
    auto browser = std::make_unique<Browser>(loop, site.address());
    browser->send(get("/"));
    vkp_test_run_until(loop, "a call", [&] { return site.held.size() == 1; });
    SECTION("the client")
    {
        browser.reset();
        vkp_test_rounds(loop, 5);
        site.answer_all();
        site.hold = false;
        Browser other(loop, site.address());
        CHECK(other.ask(get("/")).status == 200);
    }
    SECTION("the server")
    {
        vkp_http_close(site.http);
        site.answer_all();
        browser->wait_end();
        CHECK(browser->text.empty());
        CHECK(vkp_http_drain(site.http, nullptr, nullptr, VKP_FOREVER) == VKP_ERR_INVALID);
    }
    SECTION("the loop")
    {
        const std::string address = site.address();
        browser.reset();
        vkp_loop_close(loop);
        site.answer_all();
        CHECK(vkp_test_connect(address.c_str()) == -1);
    }
}

TEST_CASE("http: a server that is closed by what asks for a page")
{
    vkp_test_loop loop;
    Site site(loop);
    site.hook = [&](vkp_http_call *) { vkp_http_close(site.http); };
    Browser browser(loop, site.address());
    browser.send(get("/") + get("/"));
    browser.wait_end();
    CHECK(browser.text.empty());
    CHECK(site.asked.size() == 1);
}

TEST_CASE("http: a drain lets answers be finished, and the deadline ends it")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    Site site(loop);
    int ends = 0;
    const auto on_end = [](void *user) { ++*static_cast<int *>(user); };
    SECTION("nobody is there")
    {
        REQUIRE(vkp_http_drain(site.http, on_end, &ends, VKP_FOREVER) == VKP_OK);
        CHECK(ends == 0); // not inside the call
    }
    SECTION("one is idle, one waits")
    {
        Browser idle(loop, site.address());
        CHECK(idle.ask(get("/")).status == 200);
        site.hold = true;
        Browser waits(loop, site.address());
        waits.send(get("/") + get("/"));
        vkp_test_run_until(loop, "a call", [&] { return site.held.size() == 1; });
        REQUIRE(vkp_http_drain(site.http, on_end, &ends, VKP_FOREVER) == VKP_OK);
        CHECK(vkp_http_drain(site.http, on_end, &ends, VKP_FOREVER) == VKP_ERR_INVALID);
        idle.wait_end();
        CHECK(ends == 0);
        site.answer_all();
        const Answer answer = waits.next();
        CHECK(answer.body == page("/late"));
        waits.wait_end();
        CHECK(waits.text.empty());
        CHECK(vkp_test_connect(site.address().c_str()) == -1);
    }
    SECTION("one is never answered")
    {
        site.hold = true;
        Browser waits(loop, site.address());
        waits.send(get("/"));
        vkp_test_run_until(loop, "a call", [&] { return site.held.size() == 1; });
        REQUIRE(vkp_http_drain(site.http, on_end, &ends, vkp_loop_after_ms(loop, 20)) == VKP_OK);
        waits.wait_end();
        CHECK(waits.text.empty());
    }
    vkp_test_run_until(loop, "the end of the drain", [&] { return ends == 1; });
    vkp_test_rounds(loop, 3);
    CHECK(ends == 1);
}

TEST_CASE("http: a drain that a close ends says nothing")
{
    vkp_test_loop loop;
    Site site(loop);
    int ends = 0;
    site.hold = true;
    Browser waits(loop, site.address());
    waits.send(get("/"));
    vkp_test_run_until(loop, "a call", [&] { return site.held.size() == 1; });
    REQUIRE(vkp_http_drain(
                site.http, [](void *user) { ++*static_cast<int *>(user); }, &ends, VKP_FOREVER) ==
            VKP_OK);
    vkp_http_close(site.http);
    vkp_test_rounds(loop, 3);
    CHECK(ends == 0);
}

TEST_CASE("http: a server without what it needs is INVALID, a taken address IN_USE")
{
    vkp_test_loop loop;
    vkp_http_config config = {};
    vkp_http *http = nullptr;
    CHECK(vkp_http_open(loop, &config, &http) == VKP_ERR_INVALID);
    config.address = vkp_str_of("tcp:127.0.0.1:0");
    CHECK(vkp_http_open(loop, &config, &http) == VKP_ERR_INVALID);
    config.on_request = [](void *, const vkp_http_request *, vkp_http_call *) {};
    CHECK(vkp_http_open(nullptr, &config, &http) == VKP_ERR_INVALID);
    CHECK(vkp_http_open(loop, nullptr, &http) == VKP_ERR_INVALID);
    CHECK(vkp_http_open(loop, &config, nullptr) == VKP_ERR_INVALID);
    config.address = vkp_str_of("tcp:127.0.0.1:x");
    CHECK(vkp_http_open(loop, &config, &http) == VKP_ERR_INVALID);
    Site site(loop);
    const std::string taken = site.address();
    config.address = vkp_str_of(taken.c_str());
    CHECK(vkp_http_open(loop, &config, &http) == VKP_ERR_IN_USE);
    CHECK(http == nullptr);
}
