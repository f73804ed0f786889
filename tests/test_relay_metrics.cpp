// SPDX-License-Identifier: MIT
//
// --metrics of valkey-push-relay: what /metrics, /healthz, /status and the page say, right after
// known traffic and in outages; the text form of Prometheus, read by a parser of its own.
#include "support/catch.hpp"

#include <algorithm>
#include <cctype>
#include <csignal>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include <signal.h>

#include "support/program.h"

namespace {

using Strings = std::vector<std::string>;

// ---- HTTP ----

struct Answer {
    int status = 0;
    std::string head; // with its last line end
    std::string body;
};

Answer ask(const std::string &address, const std::string &path, const std::string &host = "[::1]",
           const std::string &method = "GET")
{
    Peer peer(vkp_test_peer_open(address.c_str()));
    Answer answer;
    const std::string request =
        method + " " + path + " HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n\r\n";
    if (!vkp_test_peer_send_text(peer.get(), request.c_str())) {
        vkp_test_fail("nothing can be asked at %s", address.c_str());
    }
    std::string text;
    for (std::string byte = text_of(peer.get(), 1); !byte.empty(); byte = text_of(peer.get(), 1)) {
        text += byte;
    }
    const size_t end = text.find("\r\n\r\n");
    if (end != std::string::npos) {
        answer.status = std::stoi(text.substr(9, 3));
        answer.head = text.substr(0, end + 2);
        answer.body = text.substr(end + 4);
    }
    return answer;
}

bool contains(const std::string &text, const std::string &part)
{
    return text.find(part) != std::string::npos;
}

// ---- the text form of Prometheus ----

// Reads it as the format's description has it: each series once, behind the HELP and TYPE of its
// family, which does not come again; what does not fit is a fault of the text.
class Metrics {
  public:
    explicit Metrics(const std::string &text)
    {
        std::istringstream lines(text);
        CHECK(text.back() == '\n');
        for (std::string line; std::getline(lines, line);) {
            INFO(line);
            if (line.compare(0, 2, "# ") == 0) {
                take_comment(line);
            } else {
                take_sample(line);
            }
        }
        check_histograms();
    }
    double value(const std::string &series) const
    {
        const auto found = values_.find(series);
        if (found == values_.end()) {
            FAIL("there is no " << series);
        }
        return found->second;
    }
    bool has(const std::string &series) const
    {
        return values_.count(series) == 1;
    }

  private:
    void take_comment(const std::string &line)
    {
        std::istringstream words(line);
        std::string hash, word, name, rest;
        words >> hash >> word >> name;
        std::getline(words, rest);
        CHECK(rest.size() > 1);
        if (word == "HELP") {
            CHECK(types_.count(name) == 0);
            family_ = name;
            return;
        }
        CHECK(word == "TYPE");
        CHECK(name == family_);
        const std::string type = rest.substr(1);
        const bool total = name.size() > 6 && name.substr(name.size() - 6) == "_total";
        CHECK((type == "counter" || type == "gauge" || type == "histogram"));
        CHECK((type == "counter") == total);
        CHECK(types_.emplace(name, type).second);
    }
    // NAME{LABEL="text",...} VALUE; the series is kept with its labels' texts as they are meant.
    void take_sample(const std::string &line)
    {
        size_t at = 0;
        while (at < line.size() && (std::isalnum(static_cast<unsigned char>(line[at])) != 0 ||
                                    line[at] == '_' || line[at] == ':')) {
            at++;
        }
        const std::string name = line.substr(0, at);
        std::string series = name;
        std::string stem = name;
        REQUIRE(at > 0);
        if (types_[family_] == "histogram") {
            for (const char *end : {"_bucket", "_sum", "_count"}) {
                if (name == family_ + end) {
                    stem = family_;
                }
            }
        }
        CHECK(stem == family_);
        if (line[at] == '{') {
            do {
                const size_t equals = line.find("=\"", ++at);
                REQUIRE(equals != std::string::npos);
                series += (series == name ? "{" : ",") + line.substr(at, equals - at) + "=";
                for (at = equals + 2; line.at(at) != '"'; at++) {
                    if (line[at] == '\\') {
                        const char next = line.at(++at);
                        CHECK((next == '\\' || next == '"' || next == 'n'));
                        series += next == 'n' ? '\n' : next;
                    } else {
                        CHECK(static_cast<unsigned char>(line[at]) >= 0x20);
                        series += line[at];
                    }
                }
            } while (line.at(++at) == ',');
            REQUIRE(line[at] == '}');
            series += "}";
            at++;
        }
        REQUIRE(line[at] == ' ');
        size_t used = 0;
        const double number = std::stod(line.substr(at + 1), &used);
        CHECK(used == line.size() - at - 1);
        CHECK(number >= 0);
        CHECK(values_.emplace(series, number).second);
        order_.push_back(series);
    }
    void check_histograms() const
    {
        double before = 0;
        int ends = 0;
        for (const std::string &series : order_) {
            const size_t bound = series.find(",le=");
            if (bound == std::string::npos) {
                continue;
            }
            INFO(series);
            CHECK(value(series) >= before);
            before = value(series);
            if (contains(series, ",le=+Inf}")) {
                std::string count = series.substr(0, bound) + "}";
                count.replace(count.find("_bucket"), 7, "_count");
                CHECK(value(count) == before);
                before = 0;
                ends++;
            }
        }
        CHECK(ends == 2);
    }
    std::string family_;
    std::map<std::string, std::string> types_;
    std::map<std::string, double> values_;
    Strings order_;
};

// ---- a relay with --metrics, and its server ----

struct ServerDeleter {
    void operator()(vkp_test_server *server) const
    {
        vkp_test_server_close(server);
    }
};
using Server = std::unique_ptr<vkp_test_server, ServerDeleter>;

#define NEEDS_SERVER()                                                   \
    if (vkp_test_server_program() == nullptr) {                          \
        WARN("left out: there is no valkey-server and no redis-server"); \
        return;                                                          \
    }

struct Site {
    explicit Site(Strings options, const std::string &metrics = "tcp:127.0.0.1:0")
        : relay(words(std::move(options), metrics))
    {
        const std::string ready = relay.line();
        web = relay.line();
        if (ready.compare(0, 7, "ready: ") != 0 || web.compare(0, 11, "ready: http") != 0) {
            vkp_test_fail("no ready line but: %s", ready.c_str());
        }
        address = ready.substr(7, ready.size() - 8);
        web = web.substr(7, web.size() - 8);
        http = web.compare(0, 7, "http://") == 0 ? "tcp:" + web.substr(7) : web.substr(5);
    }
    static Strings words(Strings options, const std::string &metrics)
    {
        options.insert(options.begin(), vkp_test_relay_program());
        for (const std::string &word :
             {std::string("--listen"), std::string(vkp_test_fresh_address("metrics")),
              std::string("--metrics"), metrics}) {
            options.push_back(word);
        }
        return options;
    }
    Peer client() const
    {
        return Peer(vkp_test_peer_open(address.c_str()));
    }
    Metrics metrics() const
    {
        const Answer answer = ask(http, "/metrics");
        CHECK(answer.status == 200);
        CHECK(contains(answer.head, "Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"));
        return Metrics(answer.body);
    }
    void wait_connected() const
    {
        vkp_test_wait_until("the server", [&] { return ask(http, "/healthz").status == 200; });
    }

    Running relay;
    std::string address;
    std::string web;
    std::string http;
};

} // namespace

TEST_CASE("/metrics: the numbers right after known traffic, with a real server")
{
    NEEDS_SERVER();
    const std::string threads = GENERATE("1", "3");
    INFO("--threads " << threads);
    Server server(vkp_test_server_open(nullptr));
    Site site({"--server", vkp_test_server_unix(server.get()), "--threads", threads});
    site.wait_connected();
    const Metrics before = site.metrics();
    Peer one = site.client();
    Peer two = site.client();
    vkp_test_ask(one.get(), "SUBSCRIBE", "news");
    for (int i = 0; i < 7; i++) {
        vkp_test_ask(two.get(), "PUBLISH", "news", "x");
        vkp_test_frame(one.get());
    }
    vkp_test_ask(two.get(), "SELECT", "1");
    const Metrics after = site.metrics();
    CHECK(after.value("vkp_clients") == 2);
    CHECK(after.value("vkp_clients_by_state{state=subscribed}") == 1);
    CHECK(after.value("vkp_clients_by_state{state=private}") == 1);
    CHECK(after.value("vkp_clients_by_state{state=idle}") == 0);
    CHECK(after.value("vkp_clients_accepted_total") == 2);
    CHECK(after.value("vkp_messages_total") == 7);
    CHECK(after.value("vkp_deliveries_total") == 7);
    CHECK(after.value("vkp_commands_total{connection=push}") == 1);
    CHECK(after.value("vkp_commands_total{connection=private}") == 1);
    CHECK(after.value("vkp_commands_total{connection=shared}") -
              before.value("vkp_commands_total{connection=shared}") ==
          7);
    CHECK(after.value("vkp_reply_seconds_count{connection=shared}") -
              before.value("vkp_reply_seconds_count{connection=shared}") ==
          7);
    CHECK(after.value("vkp_reply_seconds_count{connection=private}") == 1);
    CHECK(after.value("vkp_private_connections") == 1);
    CHECK(after.value("vkp_upstream_connected") == 1);
    CHECK(after.value("vkp_upstream_since_seconds") > 1600000000);
    CHECK(after.value("vkp_upstream_reconnects_total") == 0);
    CHECK(after.value("vkp_commands_in_flight") == 0);
    CHECK(after.value("vkp_messages_dropped_total{reason=queue_full}") == 0);
    CHECK(after.value("vkp_queued_bytes") == 0);
    CHECK(after.value("vkp_listener_clients{listener=" + site.address + "}") == 2);
    CHECK(after.value("vkp_channel_messages_total{kind=channel,channel=news}") == 7);
    CHECK(after.value("vkp_channel_subscribers{kind=channel,channel=news}") == 1);
    CHECK(after.has("vkp_loop_lag_seconds{loop=" + std::to_string(std::stoi(threads) - 1) + "}"));
    CHECK_FALSE(after.has("vkp_loop_lag_seconds{loop=" + threads + "}"));
    CHECK(site.relay.wait(SIGTERM) == 0);
}

TEST_CASE("/metrics and /status: names of any bytes stay in their place")
{
    Site site({});
    Peer subscriber = site.client();
    const Strings names = {
        "quote\"",          "back\\slash",           "line\nend",   "</script><b>",
        "na\xc3\xafve",     "bad\xff utf",           "cut\xe2\x82", "\xe2\x80\xaegnp.exe",
        "over\xc0\xaflong", "surrogate\xed\xa0\x80", "{a=\"b\"} 1", "beyond\xf4\x90\x80\x80"};
    const Strings shown = {"quote\"",
                           "back\\\\slash",
                           "line\\x0aend",
                           "</script><b>",
                           "na\xc3\xafve",
                           "bad\\xff utf",
                           "cut\\xe2\\x82",
                           "\\xe2\\x80\\xaegnp.exe",
                           "over\\xc0\\xaflong",
                           "surrogate\\xed\\xa0\\x80",
                           "{a=\"b\"} 1",
                           "beyond\\xf4\\x90\\x80\\x80"};
    Peer publisher = site.client();
    for (const std::string &name : names) {
        vkp_test_ask(subscriber.get(), "SUBSCRIBE", name);
        vkp_test_ask(publisher.get(), "PUBLISH", name, "x");
        vkp_test_frame(subscriber.get());
    }
    const std::string long_name(300, 'L');
    vkp_test_ask(subscriber.get(), "SUBSCRIBE", long_name);
    vkp_test_ask(publisher.get(), "PUBLISH", long_name, "x");
    const Metrics metrics = site.metrics();
    for (const std::string &name : shown) {
        INFO(name);
        CHECK(metrics.value("vkp_channel_messages_total{kind=channel,channel=" + name + "}") == 1);
    }
    CHECK_FALSE(metrics.has("vkp_channel_messages_total{kind=channel,channel=" +
                            long_name.substr(0, 256) + "}")); // two might be cut alike
    const std::string status = ask(site.http, "/status").body;
    CHECK(contains(status, "\"name\":\"quote\\\"\""));
    CHECK(contains(status, "\"name\":\"line\\\\x0aend\""));
    CHECK(contains(status, "\"bytes\":300,\"cut\":true"));
    CHECK(status.find_first_of(std::string("\xff\x00", 2)) == std::string::npos);
}

TEST_CASE("/healthz: 200 while the server answers, otherwise 503 and why")
{
    NEEDS_SERVER();
    const std::string threads = GENERATE("1", "3");
    Server server(vkp_test_server_open(nullptr));
    Site site({"--server", vkp_test_server_unix(server.get()), "--threads", threads});
    site.wait_connected();
    CHECK(ask(site.http, "/healthz").body == "ok\n");
    SECTION("it is gone, and comes back")
    {
        vkp_test_server_kill(server.get());
        vkp_test_wait_until("the outage", [&] { return ask(site.http, "/healthz").status == 503; });
        CHECK(site.metrics().value("vkp_upstream_connected") == 0);
        CHECK(contains(ask(site.http, "/status").body, ",\"to\":0,\"reason\":\""));
        vkp_test_server_restart(server.get());
        site.wait_connected();
        vkp_test_wait_until("the end of the outage",
                            [&] { return site.metrics().value("vkp_upstream_connected") == 1; });
        const Metrics metrics = site.metrics();
        CHECK(metrics.value("vkp_upstream_outages_total") == 2);
        CHECK(metrics.value("vkp_upstream_reconnects_total") == 2);
        const std::string status = ask(site.http, "/status").body;
        CHECK_FALSE(contains(status, "\"to\":0"));
        CHECK(contains(status, "\"outages\":[{\"from\":"));
    }
    SECTION("it is silent, and speaks again")
    {
        kill(vkp_test_server_pid(server.get()), SIGSTOP);
        const Answer answer = ask(site.http, "/healthz");
        CHECK(answer.status == 503);
        CHECK(answer.body == "the server does not answer\n");
        kill(vkp_test_server_pid(server.get()), SIGCONT);
        site.wait_connected();
    }
    SECTION("the relay ends while somebody waits")
    {
        kill(vkp_test_server_pid(server.get()), SIGSTOP);
        Peer peer(vkp_test_peer_open(site.http.c_str()));
        vkp_test_peer_send_text(peer.get(), "GET /healthz HTTP/1.0\r\n\r\n");
        CHECK(site.relay.wait(SIGTERM) == 0);
    }
}

TEST_CASE("/healthz: a relay without a server is well")
{
    Site site({});
    CHECK(ask(site.http, "/healthz").status == 200);
    CHECK(site.metrics().value("vkp_upstream_connected") == 1);
    CHECK(ask(site.http, "/healthz", "localhost", "HEAD").body.empty());
}

TEST_CASE("the page is one file, and asks nobody else")
{
    Site site({});
    const Answer answer = ask(site.http, "/");
    CHECK(answer.status == 200);
    CHECK(contains(answer.head, "Content-Type: text/html; charset=utf-8\r\n"));
    CHECK(contains(answer.head, "Content-Security-Policy: default-src 'none'; "));
    CHECK(answer.body.compare(0, 15, "<!doctype html>") == 0);
    CHECK(contains(answer.body, "</html>\n"));
    for (const char *outside :
         {"src=", "@import", "url(", "innerHTML", "document.write", "eval("}) {
        INFO(outside);
        CHECK_FALSE(contains(answer.body, outside));
    }
    size_t schemes = 0; // that of SVG is a name, not an address
    for (size_t at = answer.body.find("://"); at != std::string::npos;
         at = answer.body.find("://", at + 1)) {
        schemes++;
    }
    CHECK(schemes == 1);
    CHECK(contains(answer.body, "'http://www.w3.org/2000/svg'"));
    CHECK(ask(site.http, "/nothing").status == 404);
    CHECK(ask(site.http, "/metrics/").status == 404);
    CHECK(ask(site.http, "/", "localhost", "POST").status == 405);
}

TEST_CASE("--metrics on this machine answers for no name of a stranger; with --open for all")
{
    {
        Site site({});
        CHECK(ask(site.http, "/", "evil.example").status == 421);
        CHECK(ask(site.http, "/status", "127.0.0.1.evil.example").status == 421);
        CHECK(ask(site.http, "/metrics", "localhost:1").status == 200);
    }
    {
        Site site({"--open"}, "tcp:0.0.0.0:0");
        CHECK(site.web.compare(0, 15, "http://0.0.0.0:") == 0);
        const std::string port = site.http.substr(site.http.rfind(':'));
        CHECK(ask("tcp:127.0.0.1" + port, "/metrics", "relay.example").status == 200);
    }
    {
        Site site({"--open"}); // for --listen, perhaps: this one is still this machine's alone
        CHECK(ask(site.http, "/", "evil.example").status == 421);
    }
    {
        Site site({}, vkp_test_fresh_address("web"));
        CHECK(site.web.compare(0, 10, "http+unix:") == 0);
        CHECK(ask(site.http, "/metrics", "whatever").status == 200);
    }
}

TEST_CASE("--metrics where it cannot be is an error")
{
    Running taken({vkp_test_relay_program(), "--metrics", "tcp:127.0.0.1:none"});
    CHECK(taken.line().compare(0, 7, "ready: ") == 0); // of --listen
    CHECK(taken.line().empty());
    CHECK(taken.wait() == 1);
    Site site({});
    Running again({vkp_test_relay_program(), "--metrics", site.http});
    CHECK(again.line().compare(0, 7, "ready: ") == 0);
    CHECK(again.line().empty());
    CHECK(again.wait() == 1);
}
