// SPDX-License-Identifier: MIT
//
// valkey-push-relay as a process of its own: options, exit codes, `ready:` lines, files, signals,
// and the command line clients that people use with it.
#include "support/catch.hpp"

#include <algorithm>
#include <cctype>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "support/support.h"
extern "C" {
#include "support/internal.h"
}

namespace {

using Strings = std::vector<std::string>;

struct PeerDeleter {
    void operator()(vkp_test_peer *peer) const
    {
        vkp_test_peer_close(peer);
    }
};
using Peer = std::unique_ptr<vkp_test_peer, PeerDeleter>;

Peer open(const std::string &address)
{
    return Peer(vkp_test_peer_open(address.c_str()));
}

std::string hear(const Peer &peer)
{
    return vkp_test_frame(peer.get());
}

template <typename... Words>
std::string ask(const Peer &peer, const Words &...words)
{
    return vkp_test_ask(peer.get(), words...);
}

std::string bulk(const std::string &text)
{
    return "$" + std::to_string(text.size()) + "\r\n" + text + "\r\n";
}

std::string message(const std::string &channel, const std::string &payload)
{
    return "*3\r\n" + bulk("message") + bulk(channel) + bulk(payload);
}

bool starts_with(const std::string &text, const std::string &prefix)
{
    return text.compare(0, prefix.size(), prefix) == 0;
}

bool contains(const std::string &text, const std::string &part)
{
    return text.find(part) != std::string::npos;
}

std::string slurp(const std::string &path)
{
    std::ifstream file(path);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

// A process with its outputs. Give it an end by reap().
class Process {
  public:
    explicit Process(const Strings &words) : log(vkp_test_fresh_path("log"))
    {
        std::vector<const char *> argv;
        for (const std::string &word : words) {
            argv.push_back(word.c_str());
        }
        argv.push_back(nullptr);
        pid = vkp_test_i_spawn(argv.data(), &out_, log.c_str());
    }
    ~Process()
    {
        if (pid > 0) {
            (void)reap(SIGKILL);
        }
        close(out_);
    }
    Process(const Process &) = delete;
    Process &operator=(const Process &) = delete;
    int reap(int signal_number = 0)
    {
        int code = vkp_test_reap(pid, signal_number);
        pid = 0;
        return code;
    }
    // The next line of its output without the line end; "" at the end.
    std::string line()
    {
        uint64_t deadline = vkp_test_deadline();
        size_t end = unread_.find('\n');
        char buffer[4096];
        ssize_t got = 1;
        while (end == std::string::npos && got > 0) {
            got = vkp_test_i_poll(out_, POLLIN, deadline) ? read(out_, buffer, sizeof buffer) : 0;
            unread_.append(buffer, got > 0 ? static_cast<size_t>(got) : 0);
            end = unread_.find('\n');
        }
        std::string text = unread_.substr(0, end);
        unread_.erase(0, end == std::string::npos ? end : end + 1);
        return text;
    }
    std::string rest()
    {
        std::string text;
        for (std::string next = line(); !next.empty(); next = line()) {
            text += next + "\n";
        }
        return text;
    }
    std::string errors() const
    {
        return slurp(log);
    }

    std::string log;
    int pid = 0;

  private:
    int out_ = -1;
    std::string unread_;
};

Strings relay_words(const Strings &options)
{
    Strings words = {vkp_test_relay_program()};
    words.insert(words.end(), options.begin(), options.end());
    return words;
}

// A relay that said `ready:`.
class Relay : public Process {
  public:
    explicit Relay(Strings options, bool listen = true)
        : Process(relay_words(with_listen(options, listen)))
    {
        std::string ready = line();
        if (!starts_with(ready, "ready: ")) {
            vkp_test_fail("no ready line but: %s; %s", ready.c_str(), errors().c_str());
        }
        address = ready.substr(7);
    }
    std::string path() const
    {
        return address.substr(address.find(':') + 1);
    }

    std::string address;

  private:
    static Strings with_listen(Strings options, bool listen)
    {
        if (listen) {
            options.push_back("--listen");
            options.push_back(vkp_test_fresh_address("prog"));
        }
        return options;
    }
};

struct ServerDeleter {
    void operator()(vkp_test_server *server) const
    {
        vkp_test_server_close(server);
    }
};
using Server = std::unique_ptr<vkp_test_server, ServerDeleter>;

Server start_server(std::vector<const char *> options = {})
{
    options.push_back(nullptr);
    return Server(vkp_test_server_open(options.data()));
}

#define NEEDS_SERVER()                                                   \
    if (vkp_test_server_program() == nullptr) {                          \
        WARN("left out: there is no valkey-server and no redis-server"); \
        return;                                                          \
    }

// The server's sibling: redis-cli for redis-server; "" when it is not there.
std::string tool(const std::string &kind)
{
    std::string program = vkp_test_server_program();
    size_t at = program.rfind("-server");
    if (at == std::string::npos) {
        return "";
    }
    program.replace(at, std::string::npos, "-" + kind);
    return access(program.c_str(), X_OK) == 0 ? program : "";
}

#define NEEDS_TOOL(name, kind)                                  \
    NEEDS_SERVER();                                             \
    const std::string name = tool(kind);                        \
    if (name.empty()) {                                         \
        WARN("left out: the server has no " kind " beside it"); \
        return;                                                 \
    }

void until_connected(const Peer &peer)
{
    vkp_test_wait_until("the upstream server",
                        [&] { return ask(peer, "ECHO", "there") == "$5\r\nthere\r\n"; });
}

// ---------------------------------------------------------------------------------------------
// Options

TEST_CASE("--help and --version answer on standard output and exit with 0")
{
    Process help(relay_words({"--help"}));
    std::string text = help.rest();
    CHECK(help.reap() == 0);
    CHECK(help.errors().empty());
    for (const char *option : {"--server",
                               "--upstreams",
                               "--private",
                               "--hold",
                               "--on-gap",
                               "--user",
                               "--pass-env",
                               "--pass-file",
                               "--listen",
                               "--open",
                               "--backend",
                               "--threads",
                               "--queue-frames",
                               "--queue-bytes",
                               "--gather-bytes",
                               "--on-full",
                               "--max-clients ",
                               "--max-clients-per-uid",
                               "--allow-uid",
                               "--linger",
                               "--check-files",
                               "--shutdown-notice",
                               "--log",
                               "--log-time",
                               "--config",
                               "--check ",
                               "--help",
                               "--version",
                               "drop-oldest",
                               "drop-newest",
                               "disconnect",
                               "SIGUSR1",
                               VKP_RELAY_NOTICE_CHANNEL}) {
        INFO(option);
        CHECK(contains(text, option));
    }
    std::istringstream lines(text);
    for (std::string each; std::getline(lines, each);) {
        INFO(each);
        CHECK(each.size() <= 95); // for a terminal that is not wide
    }
    Process version(relay_words({"--version"}));
    CHECK(version.line() == std::string("valkey-push-relay ") + vkp_version_str());
    CHECK(version.reap() == 0);
}

TEST_CASE("what is no option, or no value for it, is an error with exit code 2 that names it")
{
    const Strings bad = GENERATE(
        Strings{"--nosuch"}, Strings{"--nosuch", "value"}, Strings{"argument"}, Strings{"--server"},
        Strings{"--backend", "kernel"}, Strings{"--threads", "0"}, Strings{"--threads", "-1"},
        Strings{"--threads", "many"}, Strings{"--upstreams", "0"}, Strings{"--hold", "-1"},
        Strings{"--on-gap", "drop"}, Strings{"--private", "few"}, Strings{"--threads", "1000000"},
        Strings{"--threads"}, Strings{"--queue-frames", "0"}, Strings{"--queue-bytes", "12x"},
        Strings{"--queue-bytes", ""}, Strings{"--queue-bytes", "99999999999999999999999"},
        Strings{"--on-full", "wait"}, Strings{"--on-full", "DISCONNECT"},
        Strings{"--max-clients", "0"}, Strings{"--log", "loud"}, Strings{"--gather-bytes", "65535"},
        Strings{"--gather-bytes", "2147483648"}, Strings{"--max-clients-per-uid", "0"},
        Strings{"--max-clients-per-uid", "-1"}, Strings{"--allow-uid", "root"},
        Strings{"--allow-uid", "4294967295"}, Strings{"--allow-uid", "-1"}, Strings{"--allow-uid"},
        Strings{"--linger", "soon"}, Strings{"--linger", "4294967296"},
        Strings{"--check-files", "0"}, Strings{"--check-files", "4294967296"},
        Strings{"--shutdown-notice"}, Strings{"--check"},
        Strings{"--pass-env", "VKP_TEST_NO_SUCH_VARIABLE"}, Strings{"--pass-file", "/nosuch"},
        Strings{"--config"});
    INFO(bad.front());
    Process relay(relay_words(bad));
    CHECK(relay.line().empty());
    CHECK(relay.reap() == 2);
    CHECK(contains(relay.errors(), bad.front()));
    CHECK(contains(relay.errors(), "--help"));
    CHECK(relay.errors().size() < 300); // two lines, not the whole manual
}

TEST_CASE("an option that is given twice is an error, unless it may be repeated")
{
    Process twice(relay_words({"--threads", "1", "--threads", "2"}));
    CHECK(twice.reap() == 2);
    CHECK(twice.errors() == "valkey-push-relay: --threads is given twice\n");
    Relay relay({"--allow-uid", "1", "--allow-uid", "2"});
    CHECK(relay.reap(SIGTERM) == 0);
}

TEST_CASE("a wrong value is an error that names the option, the value and what is expected")
{
    const Strings bad = GENERATE(
        Strings{"--threads", "65", "--threads: expected a number from 1 to 64, got '65'"},
        Strings{"--on-full", "wait",
                "--on-full: expected disconnect, drop-oldest or drop-newest, got 'wait'"},
        Strings{"--pass-env", "VKP_TEST_NO_SUCH_VARIABLE",
                "--pass-env: expected the name of an environment variable that is set, got "
                "'VKP_TEST_NO_SUCH_VARIABLE'"},
        Strings{"--log", "", "--log: expected error, warn, info or debug, got ''"},
        Strings{"--nosuch", "1", "unknown option: --nosuch"});
    Process relay(relay_words({bad[0], bad[1]}));
    CHECK(relay.reap() == 2);
    CHECK(starts_with(relay.errors(), "valkey-push-relay: " + bad[2] + "\n"));
    Process lacks(relay_words({"--check"}));
    CHECK(lacks.reap() == 2);
    CHECK(contains(lacks.errors(), "--check: expected tcp:HOST:PORT or unix:PATH, got nothing\n"));
}

// A file of the test's own with that text.
std::string file_of(const std::string &text)
{
    const std::string path = vkp_test_fresh_path("file");
    std::ofstream(path) << text;
    return path;
}

TEST_CASE("--config: options of a file, and the command line wins")
{
    const std::string address = vkp_test_fresh_address("file");
    const std::string other = vkp_test_fresh_address("other");
    const std::string path =
        file_of("# a comment\n\n  listen " + address + "\t \r\nlisten " + other +
                "\n\tthreads   65536\nlog info\n#log none\nlog-time\n"
                "shutdown-notice two words");
    Process wrong(relay_words({"--config", path}));
    CHECK(wrong.reap() == 2);
    CHECK(starts_with(wrong.errors(), "valkey-push-relay: " + path +
                                          ":5: --threads: expected a number from 1 to 64, got "
                                          "'65536'\n"));
    Relay relay({"--config", path, "--threads", "2"}, false);
    CHECK(relay.address == address);
    CHECK(relay.line() == "ready: " + other);
    Peer peer = open(address);
    ask(peer, "SUBSCRIBE", "c");
    CHECK(kill(relay.pid, SIGTERM) == 0);
    CHECK(hear(peer) == message(VKP_RELAY_NOTICE_CHANNEL, "two words"));
    CHECK(relay.reap() == 0);
    Relay one({"--config", path, "--threads", "1"}); // with an address of the command line
    CHECK(one.reap(SIGTERM) == 0);
    CHECK(one.rest().empty());
}

TEST_CASE("--config: a wrong file names its line")
{
    struct Wrong {
        const char *text;
        const char *message;
    };
    const Wrong wrong =
        GENERATE(Wrong{"threads", "1: --threads: expected a number from 1 to 64, got"},
                 Wrong{"\n\nnosuch 1\n", "3: unknown option: --nosuch"},
                 Wrong{"log warn\nlog info\n", "2: --log is given twice"},
                 Wrong{"open yes\n", "1: --open takes no value, got 'yes'"},
                 Wrong{"config /tmp/x\n", "1: --config is for the command line"},
                 Wrong{"check unix:x\n", "1: --check is for the command line"},
                 Wrong{"help\n", "1: unknown option: --help"});
    const std::string path = file_of(wrong.text);
    Process relay(relay_words({"--config", path}));
    CHECK(relay.reap() == 2);
    CHECK(starts_with(relay.errors(), "valkey-push-relay: " + path + ":" + wrong.message));
    Process binary(relay_words({"--config", file_of(std::string("open\0\n", 6))}));
    CHECK(binary.reap() == 2);
    CHECK(contains(binary.errors(), "Invalid argument"));
    Process absent(relay_words({"--config", "/nosuch/file"}));
    CHECK(absent.reap() == 2);
    CHECK(contains(absent.errors(), "/nosuch/file: No such file"));
}

TEST_CASE("--listen: what stands behind an address is for it alone")
{
    setenv("VKP_TEST_PASSWORD", "s3cret", 1);
    for (const char *bad : {"tcp:127.0.0.1:0,max-clients=0", "tcp:127.0.0.1:0,idle=x",
                            "tcp:127.0.0.1:0,require-pass-env=VKP_TEST_NO_SUCH_VARIABLE",
                            "tcp:127.0.0.1:0,idle=5,nosuch=1"}) {
        INFO(bad);
        Process relay(relay_words({"--listen", bad}));
        CHECK(relay.reap() == 2);
        CHECK(contains(relay.errors(), std::string("--listen: expected tcp:HOST:PORT")));
    }
    const std::string path = vkp_test_fresh_address("with,comma");
    Relay relay({"--listen", path, "--listen",
                 "tcp:0.0.0.0:0,require-pass-env=VKP_TEST_PASSWORD,max-clients=1,idle=600000"},
                false);
    CHECK(relay.address == path);
    const std::string other = relay.line().substr(7);
    Peer peer = open("tcp:127.0.0.1" + other.substr(other.rfind(':')));
    CHECK(starts_with(ask(peer, "PING"), "-NOAUTH "));
    CHECK(ask(peer, "AUTH", "s3cret") == "+OK\r\n");
    CHECK(ask(peer, "PING") == "+PONG\r\n");
    CHECK(ask(open(path), "PING") == "+PONG\r\n");
    CHECK(starts_with(hear(open("tcp:127.0.0.1" + other.substr(other.rfind(':')))), "-ERR max "));
    CHECK(relay.reap(SIGTERM) == 0);
}

TEST_CASE("TCP addresses that other machines reach need --open")
{
    const char *const address =
        GENERATE("tcp:0.0.0.0:0", "tcp:[::]:0", "tcp:127.example.com:0", "tcp:localhost.example:0");
    const std::string option = GENERATE("--listen", "--metrics");
    Process closed(relay_words({option, address}));
    CHECK(closed.reap() == 2);
    CHECK(closed.errors() ==
          "valkey-push-relay: " + option + " " + address +
              ": other machines get in without a password; --open allows that\n");
    if (std::string(address) == "tcp:0.0.0.0:0") {
        Relay open({"--listen", address, "--open"}, false);
        CHECK(open.reap(SIGTERM) == 0);
    }
    Relay local({"--listen", "tcp:localhost:0", "--listen", "tcp:127.0.0.1:0"}, false);
    CHECK(local.reap(SIGTERM) == 0);
}

TEST_CASE("--log-time: each line of the log begins with the time")
{
    Relay relay({"--log", "debug", "--log-time"});
    Peer peer = open(relay.address);
    CHECK(ask(peer, "PING") == "+PONG\r\n");
    CHECK(relay.reap(SIGTERM) == 0);
    std::istringstream lines(relay.errors());
    int count = 0;
    for (std::string each; std::getline(lines, each); count++) {
        INFO(each);
        const std::string form = "0000-00-00T00:00:00.000Z valkey-push-relay: ";
        REQUIRE(each.size() > form.size());
        for (size_t i = 0; i < form.size(); i++) {
            CHECK((form[i] == '0' ? std::isdigit(each[i]) != 0 : each[i] == form[i]));
        }
    }
    CHECK(count > 0);
}

TEST_CASE("systemd hears when the relay is ready, that it lives, and that it ends")
{
    const std::string path = vkp_test_fresh_path("notify");
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    const int fd = socket(AF_UNIX, SOCK_DGRAM, 0);
    REQUIRE(bind(fd, reinterpret_cast<const sockaddr *>(&address), sizeof address) == 0);
    const auto next = [fd] {
        char text[64] = "";
        if (vkp_test_i_poll(fd, POLLIN, vkp_test_deadline())) {
            (void)!recv(fd, text, sizeof text - 1, 0);
        }
        return std::string(text);
    };
    const bool mine = GENERATE(true, false);
    setenv("NOTIFY_SOCKET", path.c_str(), 1);
    setenv("WATCHDOG_USEC", "20000", 1);
    if (!mine) { // meant for another process
        setenv("WATCHDOG_PID", "1", 1);
    }
    Relay relay({});
    unsetenv("NOTIFY_SOCKET");
    unsetenv("WATCHDOG_USEC");
    unsetenv("WATCHDOG_PID");
    CHECK(next() == "READY=1");
    for (int i = 0; i < 3 && mine; i++) {
        CHECK(next() == "WATCHDOG=1");
    }
    CHECK(kill(relay.pid, SIGTERM) == 0);
    std::string heard = next();
    while (mine && heard == "WATCHDOG=1") {
        heard = next();
    }
    CHECK(heard == "STOPPING=1");
    CHECK(relay.reap() == 0);
    close(fd);
    unlink(path.c_str());
}

TEST_CASE("addresses that cannot be are errors with a reason, and exit code 1")
{
    const Strings bad = GENERATE(
        Strings{"--server", "nonsense"}, Strings{"--server", "tcp:localhost"},
        Strings{"--server", "http:x"}, Strings{"--listen", "nonsense"}, Strings{"--listen", "unix"},
        Strings{"--listen", "unix:/nosuch/dir/x.sock"}, Strings{"--listen", "tcp:127.0.0.1:99999"},
        Strings{"--listen", "unix:/" + std::string(200, 'x')});
    INFO(bad[0] << " " << bad[1]);
    Process relay(relay_words(bad));
    CHECK(relay.line().empty());
    CHECK(relay.reap() == 1);
    CHECK(contains(relay.errors(), bad[1]));
    CHECK(relay.errors().size() < 600); // a line, not the whole manual
}

TEST_CASE("without --listen: a unique socket in the user's folder, which is printed, private, and "
          "removed")
{
    REQUIRE(setenv("XDG_RUNTIME_DIR", vkp_test_dir(), 1) == 0);
    {
        Relay first({}, false);
        Relay second({"--listen", "unix:"}, false); // the same in words
        CHECK(starts_with(first.address, std::string("unix:") + vkp_test_dir() + "/"));
        CHECK(first.address != second.address);
        struct stat status;
        REQUIRE(stat(first.path().c_str(), &status) == 0);
        CHECK((status.st_mode & 0777) == 0600);
        CHECK(ask(open(first.address), "PING") == "+PONG\r\n");
        CHECK(ask(open(second.address), "PING") == "+PONG\r\n");
        CHECK(first.reap(SIGTERM) == 0);
        CHECK(second.reap(SIGINT) == 0);
        CHECK(!vkp_test_exists(first.path().c_str()));
        CHECK(!vkp_test_exists((first.path() + ".lock").c_str()));
        CHECK(!vkp_test_exists(second.path().c_str()));
    }
    REQUIRE(setenv("XDG_RUNTIME_DIR", "/nosuch/folder", 1) == 0);
    REQUIRE(setenv("TMPDIR", vkp_test_dir(), 1) == 0);
    Relay third({}, false);
    CHECK(starts_with(third.address, std::string("unix:") + vkp_test_dir() + "/"));
    CHECK(third.reap(SIGTERM) == 0);
    REQUIRE(unsetenv("TMPDIR") == 0);
    REQUIRE(unsetenv("XDG_RUNTIME_DIR") == 0);
}

TEST_CASE("several listeners: one ready line each, with the port that was chosen, on every backend")
{
    Strings backends;
    for (const vkp_backend *const *each = vkp_test_backends(); *each; each++) {
        backends.push_back((*each)->name);
    }
    for (const std::string &backend : backends) {
        for (const char *threads : {"1", "3"}) {
            INFO(backend << " " << threads);
            std::string unix_address = vkp_test_fresh_address("several");
            Relay relay({"--backend", backend, "--threads", threads, "--listen", "tcp:127.0.0.1:0",
                         "--listen", unix_address, "--listen", "tcp:localhost:0"},
                        false);
            std::string second = relay.line();
            std::string third = relay.line();
            CHECK(starts_with(relay.address, "tcp:127.0.0.1:"));
            CHECK(relay.address != "tcp:127.0.0.1:0");
            CHECK(second == "ready: " + unix_address);
            REQUIRE(starts_with(third, "ready: tcp:"));
            Peer one = open(relay.address);
            Peer two = open(unix_address);
            Peer three = open(third.substr(7));
            ask(one, "SUBSCRIBE", "a");
            ask(two, "SUBSCRIBE", "a");
            CHECK(ask(three, "PUBLISH", "a", "hi") == ":2\r\n");
            CHECK(hear(one) == message("a", "hi"));
            CHECK(hear(two) == message("a", "hi"));
            CHECK(relay.reap(SIGTERM) == 0);
            CHECK(!vkp_test_exists(unix_address.c_str() + 5));
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Files

TEST_CASE("two relays on one path: the second says so and fails, the first goes on")
{
    Relay first({});
    Peer peer = open(first.address);
    ask(peer, "SUBSCRIBE", "a");
    Process second(relay_words({"--listen", first.address}));
    CHECK(second.line().empty());
    CHECK(second.reap() == 1);
    CHECK(contains(second.errors(), first.path()));
    CHECK(contains(second.errors(), "in use by another process"));
    CHECK(ask(open(first.address), "PUBLISH", "a", "hi") == ":1\r\n");
    CHECK(hear(peer) == message("a", "hi"));
    CHECK(first.reap(SIGTERM) == 0);
    CHECK(!vkp_test_exists(first.path().c_str()));
}

TEST_CASE("a port that is taken: the second says so and fails")
{
    Relay first({"--listen", "tcp:127.0.0.1:0"}, false);
    Process second(relay_words({"--listen", first.address}));
    CHECK(second.reap() == 1);
    CHECK(contains(second.errors(), first.address));
    CHECK(contains(second.errors(), "in use"));
}

TEST_CASE("the file of a relay that was killed is taken over; what is no socket is left alone")
{
    std::string address = vkp_test_fresh_address("stale");
    Relay killed({"--listen", address}, false);
    CHECK(killed.reap(SIGKILL) == 128 + SIGKILL);
    REQUIRE(vkp_test_exists(address.c_str() + 5));
    Relay heir({"--listen", address}, false);
    CHECK(heir.address == address);
    CHECK(ask(open(address), "PING") == "+PONG\r\n");
    CHECK(heir.reap(SIGTERM) == 0);
    CHECK(!vkp_test_exists(address.c_str() + 5));
    CHECK(!vkp_test_exists((address.substr(5) + ".lock").c_str()));

    std::ofstream(address.substr(5)) << "precious";
    Process relay(relay_words({"--listen", address}));
    CHECK(relay.reap() == 1);
    CHECK(slurp(address.substr(5)) == "precious");
}

// ---------------------------------------------------------------------------------------------
// Signals

TEST_CASE("SIGTERM and SIGINT: what was asked is answered, clients see the end, exit code 0")
{
    NEEDS_SERVER();
    const int signal_number = GENERATE(SIGTERM, SIGINT);
    const std::string threads = GENERATE("1", "3");
    Server server = start_server();
    Relay relay({"--server", vkp_test_server_tcp(server.get()), "--threads", threads});
    Peer peer = open(relay.address);
    until_connected(peer);
    Peer subscriber = open(relay.address);
    ask(subscriber, "SUBSCRIBE", "a");
    ask(peer, "PUBLISH", "a", "last");
    CHECK(hear(subscriber) == message("a", "last"));
    CHECK(relay.reap(signal_number) == 0);
    CHECK(hear(peer).empty());
    CHECK(hear(subscriber).empty());
    CHECK(!vkp_test_exists(relay.path().c_str()));
    CHECK(!vkp_test_exists((relay.path() + ".lock").c_str()));
    CHECK(relay.errors().empty());
    Peer direct = open(vkp_test_server_tcp(server.get()));
    CHECK(ask(direct, "PUBSUB", "CHANNELS") == "*0\r\n");
}

TEST_CASE("SIGPIPE does not end it, nor do clients that go in the middle of an answer")
{
    Relay relay({});
    REQUIRE(kill(relay.pid, SIGPIPE) == 0);
    for (int i = 0; i < 50; i++) {
        Peer peer = open(relay.address);
        std::string script;
        for (int j = 0; j < 200; j++) {
            script += "ECHO " + std::string(1000, 'x') + "\r\n";
        }
        (void)send(vkp_test_peer_fd(peer.get()), script.data(), script.size(), MSG_DONTWAIT);
    }
    CHECK(ask(open(relay.address), "PING") == "+PONG\r\n");
    CHECK(relay.reap(SIGTERM) == 0);
}

// The snapshot as one text; its last line is known.
std::string metrics_of(const Relay &relay)
{
    const size_t before = relay.errors().size();
    if (kill(relay.pid, SIGUSR1) != 0) {
        vkp_test_fail("the relay is gone");
    }
    std::string text;
    vkp_test_wait_until("the metrics", [&] {
        text = relay.errors().substr(before);
        const size_t last = text.find("sockets_cleanup_total_ns ");
        return last != std::string::npos && text.find('\n', last) != std::string::npos;
    });
    return "\n" + text;
}

TEST_CASE("SIGUSR1 prints the counters, a line each, and it goes on")
{
    const std::string threads = GENERATE("1", "3");
    Relay relay({"--threads", threads, "--max-clients", "2", "--listen", "tcp:127.0.0.1:0"});
    const std::string unix_address = relay.line().substr(7);
    Peer one = open(unix_address);
    Peer two = open(relay.address);
    ask(one, "SUBSCRIBE", "a");
    ask(two, "PUBLISH", "a", "hi");
    CHECK(hear(one) == message("a", "hi"));
    hear(open(relay.address)); // one too many
    std::string text = metrics_of(relay);
    for (const char *line : {"clients 2",
                             "clients_subscribed 1",
                             "clients_idle 1",
                             "accepted 2",
                             "refused_user 0",
                             "refused_full 1",
                             "refused_user_full 0",
                             "refused_overload 0",
                             "refused_ended 0",
                             "messages_in 1",
                             "deliveries 1",
                             "dropped_frames 0",
                             "slow_closed 0",
                             "lagged 0",
                             "protocol_errors 0",
                             "outages 0",
                             "gaps 0",
                             "lost 0",
                             "connected 1",
                             "reconnects 0",
                             "refusals 0",
                             "commands_shared 0",
                             "commands_private 0",
                             "commands_push 1",
                             "commands_here 1",
                             "in_flight 0",
                             "replies_shared 0",
                             "queued_bytes 0",
                             "privates 0",
                             "privates_opened 0",
                             "privates_refused 0",
                             "sockets_live 1",
                             "sockets_created 1",
                             "sockets_ended 0",
                             "sockets_unlink_failures 0",
                             "sockets_lost 0",
                             "sockets_rebound 0"}) {
        INFO(line);
        CHECK(contains(text, "\n" + std::string(line) + "\n"));
    }
    std::istringstream lines(text.substr(1));
    for (std::string line; std::getline(lines, line);) {
        INFO(line);
        const size_t blank = line.find(' ');
        REQUIRE(blank != std::string::npos);
        CHECK(line.find_first_not_of("abcdefghijklmnopqrstuvwxyz_") == blank);
        CHECK(line.find_first_not_of("0123456789", blank + 1) == std::string::npos);
    }
    two.reset();
    vkp_test_wait_until("one client less",
                        [&] { return contains(metrics_of(relay), "\nclients 1\n"); });
    CHECK(ask(open(relay.address), "PUBLISH", "a", "still") == ":1\r\n");
    CHECK(hear(one) == message("a", "still"));
    CHECK(relay.reap(SIGTERM) == 0);
}

TEST_CASE("--shutdown-notice: what clients hear before the end")
{
    Relay relay({"--shutdown-notice", "back at noon"});
    Peer plain = open(relay.address);
    ask(plain, "PING");
    Peer subscriber = open(relay.address);
    ask(subscriber, "SUBSCRIBE", "a");
    CHECK(relay.reap(SIGTERM) == 0);
    CHECK(hear(plain) == "-ERR back at noon\r\n");
    CHECK(hear(plain).empty());
    CHECK(hear(subscriber) == message(VKP_RELAY_NOTICE_CHANNEL, "back at noon"));
    CHECK(hear(subscriber).empty());
}

TEST_CASE("redis-cli prints the notice")
{
    NEEDS_TOOL(cli, "cli");
    Relay relay({"--shutdown-notice", "back at noon"});
    Process subscriber({cli, "-s", relay.path(), "SUBSCRIBE", "news"});
    Peer peer = open(relay.address);
    vkp_test_wait_until("the subscriber", [&] {
        return ask(peer, "PUBSUB", "NUMSUB", "news") == "*2\r\n$4\r\nnews\r\n:1\r\n";
    });
    CHECK(relay.reap(SIGTERM) == 0);
    std::string text;
    for (std::string line = subscriber.line(); !line.empty(); line = subscriber.line()) {
        text += line + "\n";
        if (line == "back at noon") {
            break;
        }
    }
    CHECK(contains(text, VKP_RELAY_NOTICE_CHANNEL "\nback at noon\n"));
    (void)subscriber.reap(SIGKILL); // it would connect again for ever
}

TEST_CASE("--linger: the end comes with the last client's leaving; a signal still ends it before")
{
    const std::string threads = GENERATE("1", "2");
    Relay relay({"--linger", "0", "--threads", threads});
    Peer first = open(relay.address);
    CHECK(ask(first, "PING") == "+PONG\r\n");
    Peer second = open(relay.address);
    CHECK(ask(second, "PING") == "+PONG\r\n");
    first.reset();
    vkp_test_wait_until("one client less",
                        [&] { return contains(metrics_of(relay), "\nclients 1\n"); });
    CHECK(ask(second, "PING") == "+PONG\r\n");
    if (GENERATE(true, false)) {
        second.reset();
        CHECK(relay.reap() == 0);
    } else {
        CHECK(relay.reap(SIGTERM) == 0);
    }
    CHECK(!vkp_test_exists(relay.path().c_str()));
    CHECK(!vkp_test_exists((relay.path() + ".lock").c_str()));
}

TEST_CASE("--linger: before there was a client, and while one may return, it stays")
{
    Relay relay({"--linger", "3600000"});
    for (int i = 0; i < 3; i++) {
        CHECK(ask(open(relay.address), "PING") == "+PONG\r\n");
        vkp_test_wait_until("nobody", [&] { return contains(metrics_of(relay), "\nclients 0\n"); });
    }
    CHECK(relay.reap(SIGTERM) == 0);
}

// ---------------------------------------------------------------------------------------------
// Who comes, and is it well

TEST_CASE("--max-clients-per-uid")
{
    Relay relay({"--max-clients-per-uid", "1"});
    Peer one = open(relay.address);
    CHECK(ask(one, "PING") == "+PONG\r\n");
    CHECK(hear(open(relay.address)) == "-ERR max number of clients of this user reached\r\n");
    CHECK(contains(metrics_of(relay), "\nrefused_user_full 1\n"));
    CHECK(relay.reap(SIGTERM) == 0);
}

TEST_CASE("--allow-uid lets other users in, and nobody else")
{
    if (geteuid() != 0) {
        WARN("not run: only root can be somebody else");
        return;
    }
    constexpr unsigned nobody = 65534;
    const bool allowed = GENERATE(true, false);
    REQUIRE(chmod(vkp_test_dir(), 0711) == 0);
    Strings options = {"--allow-uid", "12345"};
    if (allowed) {
        options.insert(options.end(), {"--allow-uid", std::to_string(nobody)});
    }
    Relay relay(options);
    struct stat status;
    REQUIRE(stat(relay.path().c_str(), &status) == 0);
    CHECK((status.st_mode & 0777) == 0666);
    const pid_t pid = fork();
    if (pid == 0) {
        char told[64] = "";
        signal(SIGPIPE, SIG_IGN);
        if (setgid(nobody) != 0 || setuid(nobody) != 0) {
            _exit(9);
        }
        const int fd = vkp_test_connect(relay.address.c_str());
        (void)!write(fd, "PING\r\n", 6); // it may be closed
        const ssize_t got = fd < 0 ? -1 : read(fd, told, sizeof told - 1);
        const std::string text(told, got > 0 ? static_cast<size_t>(got) : 0);
        _exit(text == "+PONG\r\n" ? 0 : text == "-ERR this user is not allowed here\r\n" ? 1 : 2);
    }
    CHECK(vkp_test_reap(pid, 0) == (allowed ? 0 : 1));
    CHECK(ask(open(relay.address), "PING") == "+PONG\r\n");
    CHECK(relay.reap(SIGTERM) == 0);
    REQUIRE(chmod(vkp_test_dir(), 0700) == 0);
}

TEST_CASE("--check-files: what is taken away is bound again")
{
    Relay relay({"--check-files", "5", "--linger", "3600000"});
    Peer steady = open(relay.address);
    ask(steady, "SUBSCRIBE", "a");
    REQUIRE(unlink(relay.path().c_str()) == 0);
    vkp_test_wait_until("the file",
                        [&] { return contains(metrics_of(relay), "\nsockets_rebound 1\n"); });
    CHECK(ask(open(relay.address), "PUBLISH", "a", "hi") == ":1\r\n");
    CHECK(hear(steady) == message("a", "hi"));
    CHECK(contains(relay.errors(), "bound again"));
    CHECK(relay.reap(SIGTERM) == 0);
    CHECK(!vkp_test_exists(relay.path().c_str()));
}

TEST_CASE("--check says with its exit code whether somebody answers, and in a line what is wrong")
{
    auto check = [](const std::string &address) {
        Process process(relay_words({"--check", address}));
        std::string out = process.rest();
        int code = process.reap();
        std::string text = out + process.errors();
        INFO(text);
        CHECK(std::count(text.begin(), text.end(), '\n') == 1);
        CHECK(contains(text, address));
        CHECK((code == 0) == starts_with(out, "ok: "));
        return std::to_string(code) + " " + text;
    };
    SECTION("a relay")
    {
        Relay relay({"--listen", "tcp:127.0.0.1:0"});
        std::string second = relay.line().substr(7);
        CHECK(starts_with(check(relay.address), "0 ok: " + relay.address + " answered in "));
        CHECK(starts_with(check(second), "0 "));
        CHECK(contains(metrics_of(relay), "\naccepted 2\n"));
        CHECK(relay.reap(SIGTERM) == 0);
        CHECK(starts_with(check(second), "1 "));
        CHECK(contains(check(relay.address), "nobody accepts connections there"));
    }
    SECTION("a relay that is full")
    {
        Relay relay({"--max-clients", "1"});
        Peer peer = open(relay.address);
        ask(peer, "PING");
        // The excuse, or what comes after it when that was overtaken.
        const std::string told = check(relay.address);
        CHECK((contains(told, "is not PONG") || contains(told, "it closed the connection")));
    }
    SECTION("a process that was stopped")
    {
        Relay relay({});
        REQUIRE(kill(relay.pid, SIGSTOP) == 0);
        int status = 0;
        REQUIRE(waitpid(relay.pid, &status, WUNTRACED) == relay.pid);
        CHECK(contains(check(relay.address), "no answer in time"));
        REQUIRE(kill(relay.pid, SIGCONT) == 0);
        CHECK(relay.reap(SIGTERM) == 0);
    }
    SECTION("what can be no address")
    {
        CHECK(starts_with(check("nonsense"), "1 "));
    }
}

TEST_CASE("--check of a real server")
{
    NEEDS_SERVER();
    Server server = start_server();
    Process well(relay_words({"--check", vkp_test_server_tcp(server.get())}));
    CHECK(starts_with(well.line(), "ok: "));
    CHECK(well.reap() == 0);
    vkp_test_server_kill(server.get());
    Process dead(relay_words({"--check", vkp_test_server_tcp(server.get())}));
    CHECK(dead.line().empty());
    CHECK(dead.reap() == 1);
}

// ---------------------------------------------------------------------------------------------
// Upstream

TEST_CASE("the password comes from the variable or the file that is named")
{
    NEEDS_SERVER();
    Server server = start_server(
        {"--requirepass", "s3cret", "--user", "app", "on", ">pw", "+@all", "~*", "&*"});
    REQUIRE(setenv("VKP_TEST_PASSWORD", "s3cret", 1) == 0);
    REQUIRE(setenv("VKP_TEST_APP", "pw", 1) == 0);
    REQUIRE(setenv("VKP_TEST_WRONG", "nope", 1) == 0);
    std::string address = vkp_test_server_unix(server.get());
    {
        Relay relay({"--server", address, "--pass-env", "VKP_TEST_PASSWORD"});
        Peer peer = open(relay.address);
        until_connected(peer);
        CHECK(ask(peer, "ACL", "WHOAMI") == bulk("default"));
    }
    {
        Relay relay({"--server", address, "--user", "app", "--pass-env", "VKP_TEST_APP"});
        Peer peer = open(relay.address);
        until_connected(peer);
        CHECK(ask(peer, "ACL", "WHOAMI") == bulk("app"));
    }
    {
        Relay relay({"--server", address, "--pass-file", file_of("s3cret\r\nsecond line\n")});
        Peer peer = open(relay.address);
        until_connected(peer);
        CHECK(ask(peer, "ACL", "WHOAMI") == bulk("default"));
    }
    {
        Process both(relay_words({"--pass-env", "VKP_TEST_APP", "--pass-file", file_of("x")}));
        CHECK(both.reap() == 2);
        CHECK(both.errors() == "valkey-push-relay: --pass-file is given twice\n");
        const std::string path = file_of("pass-file /nosuch\nuser app\nserver " + address + "\n");
        Relay relay({"--config", path, "--pass-env", "VKP_TEST_APP"}); // wins
        Peer peer = open(relay.address);
        until_connected(peer);
        CHECK(ask(peer, "ACL", "WHOAMI") == bulk("app"));
    }
    Relay relay({"--server", address, "--pass-env", "VKP_TEST_WRONG"});
    Peer peer = open(relay.address);
    vkp_test_wait_until("the refusal on stderr",
                        [&] { return contains(relay.errors(), "WRONGPASS"); });
    CHECK(!contains(relay.errors(), "nope"));
    CHECK(ask(peer, "GET", "k").empty()); // after --hold
    CHECK(relay.reap(SIGTERM) == 0);
}

TEST_CASE("SIGHUP reads the password again")
{
    NEEDS_SERVER();
    Server server = start_server({"--user", "app", "on", ">one", "+@all", "~*", "&*"});
    const std::string address = vkp_test_server_unix(server.get());
    const std::string path = file_of("one\n");
    Relay relay({"--server", address, "--user", "app", "--pass-file", path, "--threads", "2"});
    Peer direct = open(address);
    std::vector<Peer> peers;
    for (int i = 0; i < 2; i++) { // on each thread
        peers.push_back(open(relay.address));
        until_connected(peers.back());
    }
    ask(peers[0], "SUBSCRIBE", "c");
    CHECK(ask(direct, "ACL", "SETUSER", "app", "resetpass", ">two") == "+OK\r\n");
    std::ofstream(path) << "two\n";
    CHECK(kill(relay.pid, SIGHUP) == 0);
    vkp_test_wait_until("the login", [&] {
        return contains(ask(direct, "INFO", "commandstats"), "cmdstat_auth:calls=2");
    });
    CHECK(!contains(relay.errors(), "refused"));
    // All connections begin again, private ones too, and the old password is worth nothing.
    CHECK(ask(direct, "CLIENT", "KILL", "USER", "app") == ":2\r\n");
    vkp_test_wait_until("the subscription",
                        [&] { return ask(direct, "PUBLISH", "c", "m") == ":1\r\n"; });
    CHECK(hear(peers[0]) == message("c", "m"));
    Peer other = open(relay.address);
    CHECK(ask(other, "SELECT", "1") == "+OK\r\n");
    CHECK(ask(other, "ACL", "WHOAMI") == bulk("app"));
    // A file that is gone changes nothing.
    unlink(path.c_str());
    CHECK(kill(relay.pid, SIGHUP) == 0);
    vkp_test_wait_until("the error", [&] { return contains(relay.errors(), path + ": No such"); });
    CHECK(ask(other, "PING") == "+PONG\r\n");
    CHECK(relay.reap(SIGTERM) == 0);
}

TEST_CASE("--max-clients and --log")
{
    Relay relay({"--max-clients", "2", "--log", "debug"});
    Peer one = open(relay.address);
    Peer two = open(relay.address);
    CHECK(ask(one, "PING") == "+PONG\r\n");
    CHECK(ask(two, "PING") == "+PONG\r\n");
    CHECK(hear(open(relay.address)) == "-ERR max number of clients reached\r\n");
    two.reset();
    vkp_test_wait_until("the debug log",
                        [&] { return contains(relay.errors(), "debug: client 2: "); });
}

// ---------------------------------------------------------------------------------------------
// The programs that people use with it

TEST_CASE("redis-cli prints through the relay what is published at the server")
{
    NEEDS_TOOL(cli, "cli");
    Server server = start_server();
    Relay relay({"--server", vkp_test_server_tcp(server.get())});
    until_connected(open(relay.address));
    Process subscriber({cli, "-s", relay.path(), "SUBSCRIBE", "news"});
    Process pattern({cli, "-3", "-s", relay.path(), "PSUBSCRIBE", "n*"});
    Peer direct = open(vkp_test_server_tcp(server.get()));
    vkp_test_wait_until("both", [&] {
        return ask(direct, "PUBSUB", "NUMSUB", "news") == "*2\r\n$4\r\nnews\r\n:1\r\n" &&
               ask(direct, "PUBSUB", "NUMPAT") == ":1\r\n";
    });
    Process publisher({cli, "-p", std::to_string(vkp_test_server_port(server.get())), "PUBLISH",
                       "news", "hello"});
    CHECK(publisher.line() == "2");
    CHECK(publisher.reap() == 0);
    // Its notes ("Reading messages...") differ between versions.
    auto until = [](Process &process, const std::string &wanted) {
        std::string all;
        for (std::string line = process.line(); !line.empty(); line = process.line()) {
            all += line + "\n";
            if (contains(line, wanted)) {
                break;
            }
        }
        return all;
    };
    CHECK(contains(until(subscriber, "hello"), "message\nnews\nhello\n"));
    CHECK(contains(until(pattern, "hello"), "pmessage\nn*\nnews\nhello\n"));
    for (const Strings &each : {Strings{"SET", "k", "v"}, Strings{"GET", "k"}, Strings{"INCR", "n"},
                                Strings{"LPUSH", "l", "a", "b"}, Strings{"LRANGE", "l", "0", "-1"},
                                Strings{"HGETALL", "none"}, Strings{"GET"}}) {
        INFO(each.front());
        Strings relayed = {cli, "-s", relay.path()};
        relayed.insert(relayed.end(), each.begin(), each.end());
        Process through(relayed);
        Strings expected = each.front() == "SET"     ? Strings{"OK"}
                           : each.front() == "INCR"  ? Strings{"1"}
                           : each.front() == "LPUSH" ? Strings{"2"}
                           : each.size() == 1
                               ? Strings{"ERR wrong number of arguments for 'get' command"}
                           : each.front() == "GET"    ? Strings{"v"}
                           : each.front() == "LRANGE" ? Strings{"b", "a"}
                                                      : Strings{""};
        for (const std::string &line : expected) {
            CHECK(through.line() == line);
        }
        (void)through.reap();
    }
}

TEST_CASE("redis-benchmark runs its default tests through the relay")
{
    NEEDS_TOOL(benchmark, "benchmark");
    Server server = start_server();
    Relay relay({"--server", vkp_test_server_unix(server.get()), "--threads", "2"});
    until_connected(open(relay.address));
    for (const char *pipeline : {"1", "16"}) {
        Process run({benchmark, "-s", relay.path(), "-n", "2000", "-q", "-P", pipeline});
        std::string text = run.rest();
        INFO(text << run.errors());
        CHECK(run.reap() == 0);
        for (const char *test :
             {"PING_INLINE", "PING_MBULK", "SET", "GET", "INCR", "LPUSH", "RPUSH", "LPOP", "RPOP",
              "SADD", "HSET", "SPOP", "ZADD", "ZPOPMIN", "LRANGE_600", "MSET"}) {
            INFO(test);
            CHECK(contains(text, test));
        }
        CHECK(!contains(text + run.errors(), "Error"));
    }
}

TEST_CASE("a subscriber stopped by SIGSTOP is handled as --on-full says; others see all")
{
    NEEDS_TOOL(cli, "cli");
    const std::string policy = GENERATE("drop-oldest", "drop-newest", "disconnect");
    INFO(policy);
    Relay relay({"--on-full", policy, "--queue-bytes", "100000", "--queue-frames", "1000"});
    Process stopped({cli, "-s", relay.path(), "SUBSCRIBE", "news"});
    Peer other = open(relay.address);
    ask(other, "SUBSCRIBE", "news");
    Peer publisher = open(relay.address);
    vkp_test_wait_until("the subscriber", [&] {
        return ask(publisher, "PUBSUB", "NUMSUB", "news") == "*2\r\n$4\r\nnews\r\n:2\r\n";
    });
    REQUIRE(kill(stopped.pid, SIGSTOP) == 0);
    int status = 0;
    REQUIRE(waitpid(stopped.pid, &status, WUNTRACED) == stopped.pid);
    REQUIRE(WIFSTOPPED(status));
    // More than the kernel's buffers and the queue take.
    std::string padding(1000, 'x');
    for (int i = 0; i < 4000; i++) {
        std::string payload = std::to_string(i) + padding;
        REQUIRE(starts_with(ask(publisher, "PUBLISH", "news", payload), ":"));
        if (hear(other) != message("news", payload)) {
            FAIL("the other missed message " << i);
        }
    }
    std::string count = ask(publisher, "PUBSUB", "NUMSUB", "news");
    CHECK(count ==
          std::string("*2\r\n$4\r\nnews\r\n:") + (policy == "disconnect" ? "1" : "2") + "\r\n");
    REQUIRE(kill(stopped.pid, SIGCONT) == 0);
    if (policy != "disconnect") {
        // It is served on: dropping made holes, no more. While its queue is full, what is new may
        // be what is dropped: so there is something new again and again.
        bool found = false;
        for (int i = 0; !found; i++) {
            if (i % 100 == 0) {
                ask(publisher, "PUBLISH", "news", "after");
            }
            std::string line = stopped.line();
            REQUIRE(!line.empty());
            found = contains(line, "after");
        }
    }
    (void)stopped.reap(SIGKILL); // or the drain would wait for it
    CHECK(relay.reap(SIGTERM) == 0);
}

TEST_CASE("a server killed and started again: the program goes on")
{
    NEEDS_SERVER();
    Server server = start_server();
    Relay relay({"--server", vkp_test_server_tcp(server.get()), "--threads", "2", "--hold", "20000",
                 "--private", "2"});
    Peer peer = open(relay.address);
    until_connected(peer);
    Peer subscriber = open(relay.address);
    ask(subscriber, "SUBSCRIBE", "a");
    Peer own = open(relay.address);
    CHECK(ask(own, "SELECT", "1") == "+OK\r\n");
    vkp_test_server_kill(server.get());
    CHECK(hear(own).empty());
    vkp_test_peer_command(peer.get(), "SET", "k", "waited", nullptr);
    vkp_test_server_restart(server.get());
    CHECK(hear(peer) == "+OK\r\n");
    Peer direct = open(vkp_test_server_tcp(server.get()));
    vkp_test_wait_until("the subscription", [&] {
        return ask(direct, "PUBSUB", "NUMSUB", "a") == "*2\r\n$1\r\na\r\n:1\r\n";
    });
    ask(direct, "PUBLISH", "a", "back");
    CHECK(hear(subscriber) == message("a", "back"));
    CHECK(relay.reap(SIGTERM) == 0);
}

} // namespace
