// SPDX-License-Identifier: MIT
//
// Gates: whom a listener lets in, how many at once, and that every place comes back, whichever way
// a client goes.
#include "support/catch.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "support/client_probe.h"
#include "support/listener_probe.h"

namespace {

using Strings = std::vector<std::string>;
using Uids = std::vector<uint32_t>;

using Peer = vkp_test_peer_ptr;

void tell(int fd, const std::string &text)
{
    const vkp_range range = {text.data(), text.size()};
    (void)vkp_sys_get_default()->send(fd, &range, 1);
}

const std::string k_in = "+in\r\n";
const std::string k_refusals[VKP_REFUSAL_COUNT] = {"-user\r\n", "-full\r\n", "-user full\r\n",
                                                   "-overload\r\n", "-ended\r\n"};

// A listener that greets whom it let in, and tells the others why not.
class Door {
  public:
    Door()
    {
        static const vkp_conn_ops ops = [] {
            vkp_conn_ops table = {};
            table.on_open = [](vkp_conn *conn, void *user) {
                Door *self = static_cast<Door *>(user);
                self->inside.push_back(conn);
                const vkp_bytes hello = vkp_bytes_static(k_in.data(), k_in.size());
                if (vkp_conn_send(conn, &hello) != VKP_OK) {
                    vkp_test_fail("the greeting found no way");
                }
                if (self->on_open) {
                    self->on_open(conn);
                }
            };
            table.on_data = [](vkp_conn *conn, void *user, const vkp_bytes *in) {
                Door *self = static_cast<Door *>(user);
                return self->on_data ? self->on_data(conn, in->len) : in->len;
            };
            table.on_close = [](vkp_conn *conn, void *user, vkp_close_reason reason, int) {
                Door *self = static_cast<Door *>(user);
                self->left.push_back(reason);
                vkp_test_forget_conn(&self->inside, conn);
            };
            return table;
        }();
        config.conn.ops = &ops;
        config.conn.user = this;
        config.on_refuse = [](void *user, int fd, vkp_refusal why) {
            Door *self = static_cast<Door *>(user);
            self->refused.push_back(why);
            tell(fd, k_refusals[why]);
        };
    }
    // Its connections must not tell it anything afterwards.
    ~Door()
    {
        vkp_test_close_conns(&inside);
        vkp_listener_unref(listener);
        vkp_loop_unref(loop_);
    }
    Door(const Door &) = delete;
    Door &operator=(const Door &) = delete;
    void open(vkp_loop *loop, const std::string &wanted = vkp_test_fresh_address("gate"))
    {
        if (config.socket == nullptr) {
            config.address = vkp_str_of(wanted.c_str());
        }
        if (vkp_listener_open(loop, &config, &listener) != VKP_OK) {
            vkp_test_fail("no listener at %s", wanted.c_str());
        }
        config.address = vkp_str_of(nullptr);
        address = vkp_listener_get_address(listener);
        loop_ = vkp_loop_ref(loop);
    }
    // One more client, and what it was told first.
    std::string knock(Peer *peer)
    {
        *peer = vkp_test_peer_to(address);
        return vkp_test_frame_on(loop_, peer->get());
    }
    vkp_listener_stats stats() const
    {
        return vkp_test_listener_stats_of(listener);
    }

    vkp_listener *listener = nullptr;
    vkp_listener_config config = {};
    std::string address;
    std::vector<vkp_conn *> inside;
    std::vector<vkp_close_reason> left;
    std::vector<vkp_refusal> refused;
    std::function<void(vkp_conn *)> on_open;
    std::function<size_t(vkp_conn *, size_t)> on_data;

  private:
    vkp_loop *loop_ = nullptr;
};

class Gate {
  public:
    explicit Gate(const vkp_gate_config &config)
    {
        if (vkp_gate_open(&config, &gate_) != VKP_OK) {
            vkp_test_fail("no gate");
        }
    }
    ~Gate()
    {
        vkp_gate_unref(gate_);
    }
    Gate(const Gate &) = delete;
    Gate &operator=(const Gate &) = delete;
    operator vkp_gate *() const
    {
        return gate_;
    }
    vkp_gate_stats stats() const
    {
        vkp_gate_stats stats;
        vkp_gate_get_stats(gate_, &stats);
        return stats;
    }

  private:
    vkp_gate *gate_ = nullptr;
};

uint64_t sum(const uint64_t (&refused)[VKP_REFUSAL_COUNT])
{
    uint64_t all = 0;
    for (uint64_t each : refused) {
        all += each;
    }
    return all;
}

// Clients whose user the test chooses, and a process that is somebody else.
namespace who {

std::atomic<uint32_t> uid;
std::atomic<uint32_t> own;
std::atomic<int> error;
std::atomic<int> calls;

vkp_sys table()
{
    vkp_sys sys = *vkp_sys_get_default();
    sys.peer = [](int fd, vkp_peer *peer) {
        calls++;
        if (error != 0) {
            return -error.load();
        }
        const int result = vkp_sys_get_default()->peer(fd, peer);
        peer->uid = uid;
        return result;
    };
    sys.user_id = [] { return own.load(); };
    own = vkp_sys_get_default()->user_id();
    uid = own.load();
    error = 0;
    calls = 0;
    return sys;
}

} // namespace who

constexpr uint32_t k_other = 12345;

enum class Rule { own, listed, asked };

} // namespace

// ---------------------------------------------------------------------------------------------
// Who

TEST_CASE("gate: without one, the process's own user alone comes in")
{
    const vkp_sys sys = who::table();
    vkp_test_loop loop(&vkp_backend_null, &sys);
    Door door;
    door.open(loop);
    Peer peers[4];
    CHECK(door.knock(&peers[0]) == k_in);
    who::uid = who::own + 1;
    CHECK(door.knock(&peers[1]) == k_refusals[VKP_REFUSAL_USER]);
    CHECK(vkp_test_frame_on(loop, peers[1].get()).empty()); // and closed
    // The effective user is asked for; who opened the listener does not matter.
    who::own = who::uid.load();
    CHECK(door.knock(&peers[2]) == k_in);
    who::uid = 0;
    who::own = k_other;
    CHECK(door.knock(&peers[3]) == k_refusals[VKP_REFUSAL_USER]); // not even root
    const vkp_listener_stats stats = door.stats();
    CHECK(stats.accepted == 2);
    CHECK(stats.clients == 2);
    CHECK(stats.refused[VKP_REFUSAL_USER] == 2);
    CHECK(sum(stats.refused) == 2);
    CHECK(stats.aborted + stats.failed + stats.pauses == 0);
}

TEST_CASE("gate: the uid of users that are not mapped is nobody's")
{
    static std::atomic<uint32_t> overflow{0};
    vkp_sys sys = who::table();
    sys.overflow_id = [] { return overflow.load(); };
    const uint32_t listed = 65534;
    vkp_test_loop loop(&vkp_backend_null, &sys);
    vkp_gate_config config = {};
    config.env = &loop.test.env;
    config.allow_uids = &listed;
    config.allow_uid_count = 1;
    who::uid = listed;
    const bool unmapped = GENERATE(false, true);
    const bool in_namespace = GENERATE(false, true);
    const bool any = GENERATE(false, true);
    who::own = unmapped ? listed : k_other; // a relay of such a user has no friends either
    overflow = in_namespace ? listed : UINT32_MAX;
    config.allow_any_uid = any;
    Gate gate(config);
    Door door;
    door.config.gate = gate;
    door.open(loop);
    Peer peer;
    const bool in = any || overflow == UINT32_MAX;
    CHECK(door.knock(&peer) == (in ? k_in : k_refusals[VKP_REFUSAL_USER]));
}

TEST_CASE("gate: processes of another user, as the kernel knows them")
{
    constexpr uint32_t nobody = 65534;
    if (geteuid() != 0 || vkp_sys_get_default()->overflow_id() == nobody) {
        WARN("not run: only root can be somebody else");
        return;
    }
    const Rule rule = GENERATE(Rule::own, Rule::listed, Rule::asked);
    INFO("rule " << static_cast<int>(rule));
    vkp_test_loop loop;
    vkp_registry_config shared = {};
    shared.mode = 0666; // that the kernel leaves the decision to the gate
    vkp_registry *registry = nullptr;
    REQUIRE(vkp_registry_open(&shared, &registry) == VKP_OK);
    REQUIRE(chmod(vkp_test_dir(), 0711) == 0);
    vkp_gate_config config = {};
    static vkp_peer asked;
    asked = {};
    if (rule == Rule::listed) {
        config.allow_uids = &nobody;
        config.allow_uid_count = 1;
    } else if (rule == Rule::asked) {
        config.allow = [](void *, const vkp_peer *peer) {
            asked = *peer;
            return true;
        };
    }
    Gate gate(config);
    Door door;
    door.config.gate = gate;
    door.config.registry = registry;
    door.open(loop);
    vkp_registry_unref(registry);
    const pid_t pid = fork();
    if (pid == 0) {
        char told[16] = "";
        if (setgid(nobody) != 0 || setuid(nobody) != 0) {
            _exit(9);
        }
        const int fd = vkp_test_connect(door.address.c_str());
        const ssize_t got = fd < 0 ? -1 : read(fd, told, sizeof told - 1);
        _exit(got <= 0 ? 8 : told == k_in ? 0 : told == k_refusals[VKP_REFUSAL_USER] ? 1 : 7);
    }
    int status = 0;
    vkp_test_run_until(loop, "the child", [&] { return waitpid(pid, &status, WNOHANG) == pid; });
    REQUIRE(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == (rule == Rule::own ? 1 : 0));
    if (rule == Rule::asked) {
        CHECK(asked.uid == nobody);
        CHECK(asked.gid == nobody);
        CHECK((asked.pid == pid || asked.pid == 0));
    }
    vkp_test_run_until(loop, "its place", [&] { return gate.stats().clients == 0; });
    CHECK(gate.stats().admitted == (rule == Rule::own ? 0 : 1));
    CHECK(gate.stats().refused[VKP_REFUSAL_USER] == (rule == Rule::own ? 1 : 0));
    REQUIRE(chmod(vkp_test_dir(), 0700) == 0);
}

TEST_CASE("gate: a list of users besides the process's own")
{
    const vkp_sys sys = who::table();
    vkp_test_loop loop(&vkp_backend_null, &sys);
    const size_t count = GENERATE(size_t{1}, size_t{3}, size_t{1000});
    Uids list;
    for (size_t i = 0; i < count; i++) {
        list.push_back(k_other + static_cast<uint32_t>(i * 2 % 1999)); // in no order
    }
    vkp_gate_config config = {};
    config.allow_uids = list.data();
    config.allow_uid_count = list.size();
    config.env = &loop.test.env;
    Gate gate(config);
    const Uids wanted = list;
    std::fill(list.begin(), list.end(), 0); // copied
    Door door;
    door.config.gate = gate;
    door.open(loop);
    Peer peer;
    CHECK(door.knock(&peer) == k_in);
    for (uint32_t uid : wanted) {
        who::uid = uid;
        if (door.knock(&peer) != k_in) {
            FAIL("user " << uid << " was refused");
        }
    }
    for (uint32_t uid : {k_other - 1, k_other + 2000, uint32_t{0}, UINT32_MAX}) {
        who::uid = uid;
        INFO("user " << uid);
        CHECK(door.knock(&peer) == (uid == who::own ? k_in : k_refusals[VKP_REFUSAL_USER]));
    }
}

TEST_CASE("gate: open to all users, or to whom a callback lets in")
{
    const vkp_sys sys = who::table();
    vkp_test_loop loop(&vkp_backend_null, &sys);
    struct Judge {
        bool answer;
        std::vector<vkp_peer> asked;
        std::thread::id thread;
    } judge = {true, {}, {}};
    vkp_gate_config config = {};
    config.user = &judge;
    Peer peer;
    SECTION("all")
    {
        config.allow_any_uid = true;
        Gate gate(config);
        Door door;
        door.config.gate = gate;
        door.open(loop);
        for (uint32_t uid : {uint32_t{0}, k_other, UINT32_MAX - 1}) {
            who::uid = uid;
            CHECK(door.knock(&peer) == k_in);
        }
    }
    SECTION("a callback decides instead of every other rule")
    {
        config.allow_any_uid = GENERATE(false, true);
        const uint32_t listed = k_other + 1;
        config.allow_uids = &listed;
        config.allow_uid_count = 1;
        config.allow = [](void *user, const vkp_peer *client) {
            Judge *self = static_cast<Judge *>(user);
            self->asked.push_back(*client);
            self->thread = std::this_thread::get_id();
            return self->answer;
        };
        Gate gate(config);
        Door door;
        door.config.gate = gate;
        door.open(loop);
        who::uid = k_other;
        CHECK(door.knock(&peer) == k_in);
        judge.answer = false;
        CHECK(door.knock(&peer) == k_refusals[VKP_REFUSAL_USER]);
        who::uid = listed;
        CHECK(door.knock(&peer) == k_refusals[VKP_REFUSAL_USER]);
        who::uid = who::own.load();
        CHECK(door.knock(&peer) == k_refusals[VKP_REFUSAL_USER]);
        REQUIRE(judge.asked.size() == 4);
        CHECK(judge.asked[0].uid == k_other);
        CHECK(judge.asked[0].gid == static_cast<uint32_t>(getegid()));
        CHECK((judge.asked[0].pid == static_cast<int>(getpid()) || judge.asked[0].pid == 0));
        CHECK(judge.asked[2].uid == listed);
        CHECK(judge.thread == std::this_thread::get_id());
        CHECK(gate.stats().refused[VKP_REFUSAL_USER] == 3);
    }
}

TEST_CASE("gate: a callback may use what it judges for")
{
    const vkp_sys sys = who::table();
    vkp_test_loop loop(&vkp_backend_null, &sys);
    static vkp_gate *asked;
    static Door *judged;
    vkp_gate_config config = {};
    config.max_clients_per_uid = 5;
    config.allow = [](void *, const vkp_peer *) {
        vkp_gate_stats stats;
        vkp_gate_get_stats(asked, &stats); // would hang under the gate's lock
        if (stats.admitted == 1) {
            vkp_listener_close(judged->listener);
        }
        return true;
    };
    Gate gate(config);
    Door door;
    door.config.gate = gate;
    door.open(loop);
    asked = gate;
    judged = &door;
    Peer first;
    Peer second;
    CHECK(door.knock(&first) == k_in);
    // Closed in between: told or not, it is not served, and holds no place.
    CHECK(door.knock(&second) != k_in);
    CHECK(gate.stats().clients == 1);
    CHECK(door.inside.size() == 1);
}

TEST_CASE("gate: over TCP nobody is asked who he is, but places count")
{
    const vkp_sys sys = who::table();
    who::uid = k_other;
    vkp_test_loop loop(&vkp_backend_null, &sys);
    const bool with_gate = GENERATE(false, true);
    vkp_gate_config config = {};
    config.max_clients = 2;
    config.max_clients_per_uid = 1;
    config.allow = [](void *, const vkp_peer *) { return false; };
    Gate gate(config);
    Door door;
    door.config.gate = with_gate ? static_cast<vkp_gate *>(gate) : nullptr;
    door.open(loop, "tcp:127.0.0.1:0");
    Peer peers[3];
    CHECK(door.knock(&peers[0]) == k_in);
    CHECK(door.knock(&peers[1]) == k_in);
    CHECK(door.knock(&peers[2]) == (with_gate ? k_refusals[VKP_REFUSAL_FULL] : k_in));
    CHECK(who::calls == 0);
    CHECK(gate.stats().clients == (with_gate ? 2 : 0));
}

TEST_CASE("gate: whose credentials cannot be read is never let in")
{
    const vkp_sys sys = who::table();
    vkp_test_loop loop(&vkp_backend_null, &sys);
    vkp_gate_config config = {};
    config.max_clients = 1;
    Gate gate(config);
    Door door;
    const bool with_gate = GENERATE(true, false);
    door.config.gate = with_gate ? static_cast<vkp_gate *>(gate) : nullptr;
    door.open(loop);
    Peer peer;
    SECTION("gone before it could be asked: a probe, no error")
    {
        who::error = ENOTCONN;
        for (int i = 0; i < 3; i++) {
            CHECK(door.knock(&peer).empty());
        }
        CHECK(door.stats().aborted == 3);
        CHECK(sum(door.stats().refused) == 0);
        CHECK(door.refused.empty());
        CHECK_FALSE(vkp_test_env_logged(&loop.test, "accept"));
    }
    SECTION("an error of the system")
    {
        who::error = EIO;
        CHECK(door.knock(&peer) != k_in);
    }
    CHECK(door.inside.empty());
    CHECK(door.left.empty());
    CHECK(door.stats().accepted == 0);
    CHECK(door.stats().clients == 0);
    CHECK(gate.stats().clients == 0);
    // No pause, and no place lost.
    CHECK(vkp_loop_get_deadline_ns(loop) == VKP_FOREVER);
    CHECK(door.stats().pauses == 0);
    who::error = 0;
    CHECK(door.knock(&peer) == k_in);
}

TEST_CASE("gate: clients that connect and leave at once leave nothing behind")
{
    vkp_test_loop loop;
    vkp_gate_config config = {};
    config.max_clients = 3;
    config.max_clients_per_uid = 3;
    Gate gate(config);
    Door door;
    door.config.gate = gate;
    door.open(loop);
    uint64_t knocks = 0;
    for (int i = 0; i < 100; i++) {
        const int fd = vkp_test_connect(door.address.c_str());
        REQUIRE(fd >= 0);
        close(fd);
        knocks++;
        if (i % 7 == 0) {
            loop.round();
        }
    }
    vkp_test_run_until(loop, "the last one", [&] {
        const vkp_listener_stats stats = door.stats();
        return stats.accepted + sum(stats.refused) + stats.aborted == knocks && stats.clients == 0;
    });
    CHECK(gate.stats().clients == 0);
    CHECK(gate.stats().admitted == door.stats().accepted);
    CHECK(door.stats().failed + door.stats().pauses == 0);
    Peer peer;
    CHECK(door.knock(&peer) == k_in);
}

// ---------------------------------------------------------------------------------------------
// How many

TEST_CASE("gate: as many as it has places, and the next when one left")
{
    vkp_test_loop loop(&vkp_backend_null);
    const bool of_gate = GENERATE(true, false);
    INFO((of_gate ? "the gate's" : "the listener's"));
    vkp_gate_config config = {};
    config.max_clients = of_gate ? 3 : 0;
    Gate gate(config);
    Door door;
    door.config.gate = gate;
    door.config.max_clients = of_gate ? 0 : 3;
    door.open(loop);
    Peer peers[3];
    Peer more;
    for (Peer &peer : peers) {
        CHECK(door.knock(&peer) == k_in);
    }
    for (int i = 0; i < 3; i++) {
        CHECK(door.knock(&more) == k_refusals[VKP_REFUSAL_FULL]);
        CHECK(vkp_test_frame_on(loop, more.get()).empty());
    }
    CHECK(gate.stats().clients == 3);
    CHECK(door.stats().clients == 3);
    for (int i = 0; i < 3; i++) {
        peers[i].reset();
        vkp_test_run_until(loop, "a place", [&] { return door.stats().clients == 2; });
        CHECK(gate.stats().clients == 2);
        CHECK(door.knock(&peers[i]) == k_in);
        CHECK(door.knock(&more) == k_refusals[VKP_REFUSAL_FULL]);
    }
    CHECK(door.stats().accepted == 6);
    CHECK(door.stats().refused[VKP_REFUSAL_FULL] == 6);
    CHECK(sum(door.stats().refused) == 6);
    CHECK(gate.stats().admitted == 6);
    CHECK(door.refused == std::vector<vkp_refusal>(6, VKP_REFUSAL_FULL));
}

TEST_CASE("gate: as many of one user as it says, whatever others do")
{
    const vkp_sys sys = who::table();
    vkp_test_loop loop(&vkp_backend_null, &sys);
    vkp_gate_config config = {};
    config.max_clients_per_uid = 2;
    config.max_clients = 5;
    config.allow_any_uid = true;
    Gate gate(config);
    Door doors[2]; // a user's places are the gate's, not the listener's
    for (Door &door : doors) {
        door.config.gate = gate;
        door.open(loop);
    }
    Peer peers[5];
    Peer more;
    who::uid = 1;
    CHECK(doors[0].knock(&peers[0]) == k_in);
    CHECK(doors[1].knock(&peers[1]) == k_in);
    CHECK(doors[0].knock(&more) == k_refusals[VKP_REFUSAL_USER_FULL]);
    CHECK(doors[1].knock(&more) == k_refusals[VKP_REFUSAL_USER_FULL]);
    who::uid = 2;
    CHECK(doors[0].knock(&peers[2]) == k_in);
    CHECK(doors[0].knock(&peers[3]) == k_in);
    CHECK(doors[0].knock(&more) == k_refusals[VKP_REFUSAL_USER_FULL]);
    who::uid = 1;
    peers[0].reset();
    vkp_test_run_until(loop, "a place", [&] { return gate.stats().clients == 3; });
    CHECK(doors[1].knock(&peers[0]) == k_in);
    CHECK(doors[1].knock(&more) == k_refusals[VKP_REFUSAL_USER_FULL]);
    who::uid = 3;
    CHECK(doors[1].knock(&peers[4]) == k_in);
    who::uid = 4;
    CHECK(doors[1].knock(&more) == k_refusals[VKP_REFUSAL_FULL]);
    CHECK(gate.stats().clients == 5);
    CHECK(gate.stats().refused[VKP_REFUSAL_USER_FULL] == 4);
    CHECK(gate.stats().refused[VKP_REFUSAL_FULL] == 1);
    CHECK(doors[0].stats().refused[VKP_REFUSAL_USER_FULL] == 2);
    CHECK(doors[1].stats().refused[VKP_REFUSAL_USER_FULL] == 2);
}

TEST_CASE("gate: who is refused for one reason takes no place that another reason counts")
{
    const vkp_sys sys = who::table();
    vkp_test_loop loop(&vkp_backend_null, &sys);
    vkp_gate_config config = {};
    config.max_clients = 4;
    config.max_clients_per_uid = 2;
    config.allow_uids = &k_other;
    config.allow_uid_count = 1;
    Gate gate(config);
    Door narrow;
    Door wide;
    narrow.config.max_clients = 1;
    for (Door *door : {&narrow, &wide}) {
        door->config.gate = gate;
        door->open(loop);
    }
    Peer peers[5];
    Peer more;
    CHECK(narrow.knock(&peers[0]) == k_in);
    for (int i = 0; i < 10; i++) {
        CHECK(narrow.knock(&more) == k_refusals[VKP_REFUSAL_FULL]); // the listener's
    }
    CHECK(wide.knock(&peers[1]) == k_in); // there was still a place of the user's
    for (int i = 0; i < 10; i++) {
        CHECK(wide.knock(&more) == k_refusals[VKP_REFUSAL_USER_FULL]);
        who::uid = k_other + 1;
        CHECK(wide.knock(&more) == k_refusals[VKP_REFUSAL_USER]);
        who::uid = who::own.load();
    }
    who::uid = k_other;
    CHECK(wide.knock(&peers[2]) == k_in);
    CHECK(wide.knock(&peers[3]) == k_in);
    CHECK(gate.stats().clients == 4);
    who::uid = who::own.load();
    peers[0].reset();
    vkp_test_run_until(loop, "a place", [&] { return gate.stats().clients == 3; });
    who::uid = k_other;
    CHECK(narrow.knock(&more) == k_refusals[VKP_REFUSAL_USER_FULL]);
    who::uid = who::own.load();
    CHECK(narrow.knock(&peers[0]) == k_in); // the listener's place was not taken by that
    CHECK(narrow.stats().clients == 1);
    CHECK(wide.stats().clients == 3);
    // Each knock has one outcome.
    CHECK(narrow.stats().accepted + sum(narrow.stats().refused) == 13);
    CHECK(wide.stats().accepted + sum(wide.stats().refused) == 23);
    CHECK(gate.stats().admitted == narrow.stats().accepted + wide.stats().accepted);
}

TEST_CASE("gate: users who came and went leave no memory behind")
{
    const vkp_sys sys = who::table();
    vkp_test_loop loop(&vkp_backend_null, &sys);
    vkp_test_env test;
    vkp_test_env_init(&test);
    {
        vkp_gate_config config = {};
        config.max_clients_per_uid = 1;
        config.allow_any_uid = true;
        config.env = &test.env;
        Gate gate(config);
        Door door;
        door.config.gate = gate;
        door.open(loop);
        size_t early = 0;
        for (uint32_t uid = 1; uid <= 3000; uid++) {
            Peer peer;
            who::uid = uid * 7;
            if (door.knock(&peer) != k_in) {
                FAIL("user " << uid << " was refused");
            }
            peer.reset();
            vkp_test_run_until(loop, "the place", [&] { return gate.stats().clients == 0; });
            early = uid == 100 ? vkp_test_env_live_bytes(&test) : early;
        }
        CHECK(vkp_test_env_live_bytes(&test) <= early);
    }
    vkp_test_env_deinit(&test);
}

// ---------------------------------------------------------------------------------------------
// Places come back

TEST_CASE("gate: a connection's place comes back at its close, whichever way it ends")
{
    const vkp_backend *backend = GENERATE(&vkp_backend_null, vkp_test_backends()[0]);
    INFO("backend " << backend->name);
    vkp_test_loop loop(backend);
    vkp_gate_config config = {};
    config.max_clients = 1;
    config.max_clients_per_uid = 1;
    Gate gate(config);
    Door door;
    door.config.gate = gate;
    door.config.max_clients = 1;
    door.config.conn.queue_bytes = 1000;
    door.config.conn.input_bytes = 1000;
    door.config.conn.on_full = VKP_ON_FULL_DISCONNECT;
    vkp_conn *kept = nullptr;
    vkp_close_reason reason = VKP_CLOSE_LOCAL;
    Peer peer;
    door.on_open = [&](vkp_conn *conn) { kept = vkp_conn_ref(conn); };
    auto enter = [&] {
        door.open(loop);
        CHECK(door.knock(&peer) == k_in);
        REQUIRE(kept != nullptr);
        CHECK(gate.stats().clients == 1);
        CHECK(door.stats().clients == 1);
    };
    bool loop_ended = false;
    SECTION("the peer leaves")
    {
        enter();
        peer.reset();
        reason = VKP_CLOSE_PEER;
    }
    SECTION("it is closed")
    {
        enter();
        vkp_conn_close(kept);
        CHECK(gate.stats().clients == 0); // at once
        CHECK(door.stats().clients == 0);
    }
    SECTION("it is closed by another thread")
    {
        enter();
        std::thread([&] { vkp_conn_close(kept); }).join();
    }
    SECTION("in on_accept")
    {
        door.config.on_accept = [](void *, vkp_conn *conn) { vkp_conn_close(conn); };
        door.open(loop);
        CHECK(door.knock(&peer).empty());
    }
    SECTION("in on_open")
    {
        door.on_open = [&](vkp_conn *conn) { vkp_conn_close(conn); };
        door.open(loop);
        (void)door.knock(&peer);
    }
    SECTION("in on_data")
    {
        enter();
        door.on_data = [](vkp_conn *conn, size_t) {
            vkp_conn_close(conn);
            return size_t{0};
        };
        vkp_test_peer_send_text(peer.get(), "+x\r\n");
    }
    SECTION("it is drained")
    {
        enter();
        vkp_conn_drain(kept);
    }
    SECTION("it is too slow")
    {
        enter();
        const std::string text(600000, 'x');
        const vkp_bytes frame = vkp_bytes_static(text.data(), text.size());
        vkp_test_run_until(loop, "the end", [&] {
            (void)!vkp_conn_push(kept, &frame, 0);
            return !vkp_conn_is_open(kept);
        });
        reason = VKP_CLOSE_SLOW;
    }
    SECTION("it sends more than is read")
    {
        enter();
        door.on_data = [](vkp_conn *, size_t) { return size_t{0}; };
        (void)vkp_test_peer_send_text(peer.get(), std::string(5000, 'x').c_str());
        vkp_test_run_until(loop, "the end", [&] { return !vkp_conn_is_open(kept); });
        reason = door.left.empty() ? reason : door.left[0];
        CHECK(reason != VKP_CLOSE_LOCAL);
    }
    SECTION("there is no memory for what it sends")
    {
        enter();
        door.on_data = [](vkp_conn *, size_t) { return size_t{0}; };
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_FROM, 1);
        vkp_test_peer_send_text(peer.get(), "+x\r\n");
        vkp_test_run_until(loop, "the end", [&] { return !vkp_conn_is_open(kept); });
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
        reason = VKP_CLOSE_NOMEM;
    }
    SECTION("a system call fails on it")
    {
        enter();
        // Its own descriptor, under its feet: what it writes next fails.
        REQUIRE(shutdown(vkp_conn_get_fd(kept), SHUT_WR) == 0);
        const vkp_bytes frame = vkp_bytes_static("+x\r\n", 4);
        REQUIRE(vkp_conn_send(kept, &frame) == VKP_OK);
        reason = VKP_CLOSE_ERROR;
    }
    SECTION("its loop is closed")
    {
        enter();
        loop.close();
        loop_ended = true;
        reason = VKP_CLOSE_LOOP;
    }
    if (!loop_ended) {
        vkp_test_run_until(loop, "the end", [&] { return door.left.size() == 1; });
    }
    CHECK(door.left == std::vector<vkp_close_reason>{reason});
    // A reference that somebody keeps is no client.
    CHECK(gate.stats().clients == 0);
    CHECK(door.stats().clients == 0);
    if (!loop_ended) {
        door.on_open = nullptr;
        door.on_data = nullptr;
        Door next;
        next.config.gate = gate;
        next.open(loop);
        Peer another;
        CHECK(next.knock(&another) == k_in);
        another.reset();
        vkp_test_run_until(loop, "the end", [&] { return next.left.size() == 1; });
    }
    vkp_conn_unref(kept);
}

// A listener that hands descriptors on.
struct Handing {
    vkp_listener_config config = {};
    vkp_listener *listener = nullptr;
    std::vector<std::pair<int, vkp_seat *>> given;
    std::vector<vkp_refusal> refused;

    explicit Handing(vkp_gate *gate)
    {
        config.gate = gate;
        config.conn.user = this;
        config.on_fd = [](void *user, int fd, vkp_seat *seat) {
            static_cast<Handing *>(user)->given.emplace_back(fd, seat);
        };
        config.on_refuse = [](void *user, int, vkp_refusal why) {
            static_cast<Handing *>(user)->refused.push_back(why);
        };
    }
    ~Handing()
    {
        vkp_listener_unref(listener);
    }
    Handing(const Handing &) = delete;
    Handing &operator=(const Handing &) = delete;
};

TEST_CASE("gate: a descriptor handed on keeps its place until the seat is left")
{
    vkp_test_loop loop(&vkp_backend_null);
    vkp_gate_config config = {};
    config.max_clients = 1;
    config.env = &loop.test.env;
    vkp_gate *gate = nullptr;
    REQUIRE(vkp_gate_open(&config, &gate) == VKP_OK);
    auto clients = [&] {
        vkp_gate_stats stats;
        vkp_gate_get_stats(gate, &stats);
        return stats.clients;
    };
    const std::string address = vkp_test_fresh_address("gate");
    Handing handing(gate);
    handing.config.address = vkp_str_of(address.c_str());
    REQUIRE(vkp_listener_open(loop, &handing.config, &handing.listener) == VKP_OK);
    Peer peer = vkp_test_peer_to(address);
    vkp_test_run_until(loop, "a descriptor", [&] { return handing.given.size() == 1; });
    const int fd = handing.given[0].first;
    vkp_seat *seat = handing.given[0].second;
    REQUIRE(seat != nullptr);
    Peer more = vkp_test_peer_to(address);
    CHECK(vkp_test_frame_on(loop, more.get()).empty());
    CHECK(handing.refused == std::vector<vkp_refusal>{VKP_REFUSAL_FULL});
    CHECK(clients() == 1);
    vkp_seat_unref(nullptr);
    SECTION("left by whoever has it")
    {
        close(fd);
        CHECK(clients() == 1); // the seat counts, not the descriptor
        vkp_seat_unref(seat);
        CHECK(clients() == 0);
    }
    SECTION("left on another thread, after listener and gate went")
    {
        vkp_listener_unref(std::exchange(handing.listener, nullptr));
        vkp_gate_unref(std::exchange(gate, nullptr));
        close(fd);
        std::thread([&] { vkp_seat_unref(seat); }).join();
    }
    SECTION("left after the loop went")
    {
        vkp_listener_unref(std::exchange(handing.listener, nullptr));
        loop.close();
        close(fd);
        CHECK(clients() == 1);
        vkp_seat_unref(seat);
        CHECK(clients() == 0);
    }
    SECTION("kept by a connection until its close")
    {
        vkp_conn_ops ops = {};
        vkp_conn_config conn_config = {};
        conn_config.ops = &ops;
        vkp_conn *conn = nullptr;
        REQUIRE(vkp_conn_open(loop, fd, &conn_config, &conn) == VKP_OK);
        vkp_conn_set_seat(conn, seat);
        loop.round();
        CHECK(clients() == 1);
        vkp_conn_close(conn);
        CHECK(clients() == 0);
        vkp_conn_unref(conn);
    }
    if (gate != nullptr && loop != nullptr) {
        Peer next = vkp_test_peer_to(address);
        vkp_test_run_until(loop, "the next", [&] { return handing.given.size() == 2; });
        close(handing.given[1].first);
        vkp_seat_unref(handing.given[1].second);
    }
    vkp_gate_unref(gate);
}

TEST_CASE("gate: a listener that closes leaves its clients their places")
{
    vkp_test_loop loop(&vkp_backend_null);
    vkp_gate_config config = {};
    config.max_clients = 2;
    Gate gate(config);
    auto first = std::make_unique<Door>();
    first->config.gate = gate;
    first->open(loop);
    Door second;
    second.config.gate = gate;
    second.open(loop);
    Peer peers[3];
    CHECK(first->knock(&peers[0]) == k_in);
    CHECK(second.knock(&peers[1]) == k_in);
    vkp_listener_unref(std::exchange(first->listener, nullptr));
    loop.round();
    CHECK(gate.stats().clients == 2);
    CHECK(second.knock(&peers[2]) == k_refusals[VKP_REFUSAL_FULL]);
    peers[0].reset();
    vkp_test_run_until(loop, "the place", [&] { return first->left.size() == 1; });
    CHECK(second.knock(&peers[2]) == k_in);
}

TEST_CASE("gate: nobody need be told")
{
    const vkp_sys sys = who::table();
    vkp_test_loop loop(&vkp_backend_null, &sys);
    Door door;
    door.config.on_refuse = nullptr;
    door.config.max_clients = 1;
    door.open(loop);
    Peer peer;
    Peer more;
    who::uid = k_other;
    CHECK(door.knock(&more).empty());
    who::uid = who::own.load();
    CHECK(door.knock(&peer) == k_in);
    CHECK(door.knock(&more).empty());
    CHECK(door.stats().refused[VKP_REFUSAL_USER] == 1);
    CHECK(door.stats().refused[VKP_REFUSAL_FULL] == 1);
}

// ---------------------------------------------------------------------------------------------
// Memory, threads

TEST_CASE("gate: every allocation of its opening may fail")
{
    vkp_test_env test;
    vkp_test_env_init(&test);
    const uint32_t uids[] = {1, 2, 3};
    vkp_gate_config config = {};
    config.env = &test.env;
    config.allow_uids = uids;
    config.allow_uid_count = 3;
    vkp_gate *gate = nullptr;
    CHECK(vkp_gate_open(nullptr, nullptr) == VKP_ERR_INVALID);
    uint64_t k = 1;
    for (;; k++) {
        vkp_test_env_fault(&test, VKP_TEST_FAULT_ONCE, k);
        const vkp_status status = vkp_gate_open(&config, &gate);
        vkp_test_env_fault(&test, VKP_TEST_FAULT_NONE, 0);
        if (status == VKP_OK) {
            break;
        }
        CHECK(status == VKP_ERR_NOMEM);
        CHECK(gate == nullptr);
        CHECK(vkp_test_env_live_blocks(&test) == 0);
    }
    CHECK(k > 1);
    CHECK(vkp_gate_ref(gate) == gate);
    vkp_gate_unref(gate);
    vkp_gate_unref(gate);
    vkp_gate_unref(nullptr);
    CHECK(vkp_gate_open(nullptr, &gate) == VKP_OK); // all defaults
    vkp_gate_unref(gate);
    vkp_test_env_deinit(&test);
}

TEST_CASE("gate: a client for whom there is no memory is told, and takes no place")
{
    vkp_test_loop loop(&vkp_backend_null);
    vkp_gate_config config = {};
    config.max_clients = 1;
    config.max_clients_per_uid = 1;
    config.env = &loop.test.env;
    Gate gate(config);
    Door door;
    door.config.gate = gate;
    door.open(loop);
    Peer peer;
    uint64_t k = 1;
    uint64_t told = 0;
    for (;; k++) {
        INFO("allocation " << k);
        const uint64_t failures = vkp_test_env_failures(&loop.test);
        peer.reset(vkp_test_peer_open(door.address.c_str()));
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_ONCE, k);
        // The greeting itself has memory again: accept is one round, and needs it before.
        const uint64_t seen = door.stats().accepted + sum(door.stats().refused);
        door.on_open = [&](vkp_conn *) { vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0); };
        vkp_test_run_until(loop, "an outcome", [&] {
            return door.stats().accepted + sum(door.stats().refused) > seen;
        });
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
        if (vkp_test_env_failures(&loop.test) == failures) {
            break;
        }
        const std::string first = vkp_test_frame_on(loop, peer.get());
        if (first != k_in) { // some memory is only wished for
            CHECK(first == k_refusals[VKP_REFUSAL_OVERLOAD]);
            CHECK(vkp_test_frame_on(loop, peer.get()).empty());
            CHECK(gate.stats().clients == 0);
            CHECK(door.stats().clients == 0);
            told++;
        }
        peer.reset();
        vkp_test_run_until(loop, "no clients", [&] { return gate.stats().clients == 0; });
    }
    CHECK(told > 0);
    CHECK(door.stats().refused[VKP_REFUSAL_OVERLOAD] == told);
    CHECK(vkp_test_frame_on(loop, peer.get()) == k_in);
}

TEST_CASE("gate: threads: one gate before two listeners on two loops never has too many inside")
{
    constexpr size_t places = 20;
    vkp_test_loop loops[2];
    vkp_gate_config config = {};
    config.max_clients = places;
    Gate gate(config);
    std::atomic<size_t> most{0};
    Door doors[2];
    for (int i = 0; i < 2; i++) {
        doors[i].config.gate = gate;
        doors[i].on_open = [&](vkp_conn *) {
            const size_t now = gate.stats().clients;
            size_t before = most.load();
            while (before < now && !most.compare_exchange_weak(before, now)) {
            }
        };
        doors[i].open(loops[i]);
    }
    auto first = std::make_unique<vkp_test_loop_thread>(loops[0]);
    auto second = std::make_unique<vkp_test_loop_thread>(loops[1]);
    // The two loops' threads share them out; then nobody gets in at either.
    std::vector<Peer> held;
    for (size_t i = 0; i < places; i++) {
        held.emplace_back(vkp_test_peer_open(doors[i % 2].address.c_str()));
        REQUIRE(vkp_test_frame(held.back().get()) == k_in);
    }
    for (size_t i = 0; i < places; i++) {
        Peer more(vkp_test_peer_open(doors[i % 2].address.c_str()));
        REQUIRE(vkp_test_frame(more.get()) == k_refusals[VKP_REFUSAL_FULL]);
    }
    held.clear();
    vkp_test_wait_until("all places", [&] { return gate.stats().clients == 0; });
    CHECK(gate.stats().admitted == places);
    CHECK(gate.stats().refused[VKP_REFUSAL_FULL] == places);
    // A storm: each client thread keeps more than its share.
    std::atomic<size_t> in{0};
    std::atomic<size_t> out{0};
    std::atomic<size_t> wrong{0};
    std::vector<std::thread> storm;
    for (int t = 0; t < 2; t++) {
        storm.emplace_back([&, t] {
            std::vector<Peer> mine;
            for (size_t i = 0; i < 300; i++) {
                const size_t at = (i + static_cast<size_t>(t)) % 2;
                Peer peer = vkp_test_peer_to(doors[at].address);
                const std::string told = vkp_test_frame(peer.get());
                if (told == k_in) {
                    in++;
                    mine.push_back(std::move(peer));
                } else if (told == k_refusals[VKP_REFUSAL_FULL]) {
                    out++;
                } else {
                    wrong++;
                }
                if (mine.size() > 12) {
                    mine.erase(mine.begin(), mine.begin() + 6);
                }
            }
        });
    }
    for (std::thread &thread : storm) {
        thread.join();
    }
    vkp_test_wait_until("all places", [&] { return gate.stats().clients == 0; });
    CHECK(wrong == 0);
    CHECK(in + out == 600);
    const vkp_gate_stats stats = gate.stats();
    CHECK(stats.admitted == places + in);
    CHECK(stats.refused[VKP_REFUSAL_FULL] == places + out);
    CHECK(most <= places);
    CHECK(most == places); // in the first part at the latest
    first.reset();
    second.reset();
    CHECK(doors[0].stats().accepted + doors[1].stats().accepted == stats.admitted);
    CHECK(doors[0].stats().clients + doors[1].stats().clients == 0);
    CHECK(sum(doors[0].stats().refused) + sum(doors[1].stats().refused) == sum(stats.refused));
}

TEST_CASE("gate: threads: seats are left by threads while others are taken")
{
    vkp_test_loop loop;
    vkp_gate_config config = {};
    config.max_clients_per_uid = 64;
    Gate gate(config);
    struct Hall {
        vkp_mpsc_tx *tx;
    } hall = {};
    struct Place {
        int fd;
        vkp_seat *seat;
    };
    vkp_mpsc_config queue = {};
    queue.elem_bytes = sizeof(Place);
    vkp_mpsc_rx *rx = nullptr;
    REQUIRE(vkp_mpsc_open(&queue, &hall.tx, &rx) == VKP_OK);
    vkp_listener_config listening = {};
    const std::string address = vkp_test_fresh_address("gate");
    listening.address = vkp_str_of(address.c_str());
    listening.gate = gate;
    listening.conn.user = &hall;
    listening.on_fd = [](void *user, int fd, vkp_seat *seat) {
        const Place place = {fd, seat};
        if (vkp_mpsc_try_send(static_cast<Hall *>(user)->tx, &place) != VKP_OK) {
            vkp_test_fail("the hall is full");
        }
    };
    vkp_listener *listener = nullptr;
    REQUIRE(vkp_listener_open(loop, &listening, &listener) == VKP_OK);
    constexpr size_t knocks = 1000;
    {
        vkp_test_loop_thread thread(loop);
        std::atomic<size_t> wrong{0};
        std::thread leaver([&] {
            Place place;
            for (size_t i = 0; i < knocks; i++) {
                if (vkp_mpsc_recv(rx, vkp_test_deadline(), &place) != VKP_OK) {
                    vkp_test_fail("a client is missing");
                }
                tell(place.fd, "+done\r\n");
                close(place.fd);
                vkp_seat_unref(place.seat);
            }
        });
        for (size_t i = 0; i < knocks; i++) {
            Peer peer = vkp_test_peer_to(address);
            wrong += vkp_test_frame(peer.get()) == "+done\r\n" ? 0 : 1;
        }
        leaver.join();
        CHECK(wrong == 0);
    }
    CHECK(gate.stats().clients == 0);
    CHECK(gate.stats().admitted == knocks);
    vkp_listener_stats stats;
    vkp_listener_get_stats(listener, &stats);
    CHECK(stats.clients == 0);
    CHECK(stats.accepted == knocks);
    vkp_listener_unref(listener);
    vkp_mpsc_tx_unref(hall.tx);
    vkp_mpsc_rx_unref(rx);
}
