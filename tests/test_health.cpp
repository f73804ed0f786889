// SPDX-License-Identifier: MIT
//
// Health checks: what each answer, or none, counts as; how often they come; their end anywhere.
#include "support/catch.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "support/client_probe.h"
#include "support/listener_probe.h"

namespace {

using Statuses = std::vector<vkp_status>;

// A server on the loop that does as it is told with what it is asked.
class Patient {
  public:
    explicit Patient(vkp_loop *loop, const std::string &address = vkp_test_fresh_address("health"))
        : address(address)
    {
        static const vkp_conn_ops ops = [] {
            vkp_conn_ops table = {};
            table.on_open = [](vkp_conn *conn, void *user) {
                Patient *self = static_cast<Patient *>(user);
                self->conns.push_back(conn);
                if (self->on_open) {
                    self->on_open(conn);
                }
            };
            table.on_data = [](vkp_conn *conn, void *user, const vkp_bytes *in) {
                Patient *self = static_cast<Patient *>(user);
                self->asked.append(reinterpret_cast<const char *>(in->data), in->len);
                if (self->on_data) {
                    self->on_data(conn);
                }
                return in->len;
            };
            table.on_close = [](vkp_conn *conn, void *user, vkp_close_reason reason, int) {
                Patient *self = static_cast<Patient *>(user);
                self->left.push_back(reason);
                vkp_test_forget_conn(&self->conns, conn);
            };
            return table;
        }();
        vkp_listener_config config = {};
        config.address = vkp_str_of(this->address.c_str());
        config.conn.ops = &ops;
        config.conn.user = this;
        if (vkp_listener_open(loop, &config, &listener_) != VKP_OK) {
            vkp_test_fail("no listener");
        }
        this->address = vkp_listener_get_address(listener_);
    }
    // Its connections must not tell it anything afterwards.
    ~Patient()
    {
        vkp_test_close_conns(&conns);
        vkp_listener_unref(listener_);
    }
    Patient(const Patient &) = delete;
    Patient &operator=(const Patient &) = delete;
    void answer(const std::string &text)
    {
        on_data = [this, text](vkp_conn *conn) { say(conn, text); };
    }
    void say(vkp_conn *conn, const std::string &text)
    {
        vkp_bytes bytes;
        if (vkp_bytes_copy(nullptr, text.data(), text.size(), &bytes) != VKP_OK) {
            vkp_test_fail("no memory for an answer");
        }
        (void)!vkp_conn_send(conn, &bytes); // it may be closed
        vkp_bytes_unref(&bytes);
    }
    void die()
    {
        vkp_listener_unref(std::exchange(listener_, nullptr));
    }

    std::string address;
    std::string asked;
    std::vector<vkp_conn *> conns;
    std::vector<vkp_close_reason> left;
    std::function<void(vkp_conn *)> on_open;
    std::function<void(vkp_conn *)> on_data;

  private:
    vkp_listener *listener_ = nullptr;
};

// A check and what it told.
struct Doctor {
    vkp_health_config config = {};
    vkp_health_check *check = nullptr;
    std::vector<vkp_health> told;
    std::vector<uint64_t> times; // of the loop
    std::function<void()> hook;
    vkp_loop *loop = nullptr;

    Doctor()
    {
        config.user = this;
        config.on_result = [](void *user, const vkp_health *health) {
            Doctor *self = static_cast<Doctor *>(user);
            self->told.push_back(*health);
            self->times.push_back(vkp_loop_get_now_ns(self->loop));
            if (self->hook) {
                self->hook();
            }
        };
    }
    ~Doctor()
    {
        close();
    }
    Doctor(const Doctor &) = delete;
    Doctor &operator=(const Doctor &) = delete;
    vkp_status try_open(vkp_loop *on, const std::string &address)
    {
        loop = on;
        const std::string copy = address; // borrowed, and gone when this returns
        config.address = vkp_str_of(copy.c_str());
        return vkp_health_check_open(on, &config, &check);
    }
    void open(vkp_loop *on, const std::string &address)
    {
        if (try_open(on, address) != VKP_OK) {
            vkp_test_fail("no check of %s", address.c_str());
        }
    }
    void close()
    {
        vkp_health_check_unref(std::exchange(check, nullptr));
    }
    // The next result; on virtual time, without any other reason for time to pass.
    vkp_health next()
    {
        const size_t before = told.size();
        vkp_test_run_until(loop, "a result", [&] { return told.size() > before; });
        return told[before];
    }
    Statuses statuses() const
    {
        Statuses all;
        for (const vkp_health &each : told) {
            all.push_back(each.status);
        }
        return all;
    }
};

// Let time pass, in steps that a timer may cut short.
void pass(vkp_test_loop &loop, uint64_t ms)
{
    const uint64_t until = loop.now() + ms * vkp_test_ms;
    while (loop.now() < until) {
        loop.round(until);
    }
}

} // namespace

TEST_CASE("health: arguments that cannot be")
{
    vkp_test_loop loop(&vkp_backend_null);
    Doctor doctor;
    doctor.loop = loop;
    vkp_health_check *check = nullptr;
    doctor.config.address = vkp_str_of("tcp:127.0.0.1:1");
    CHECK(vkp_health_check_open(nullptr, &doctor.config, &check) == VKP_ERR_INVALID);
    CHECK(vkp_health_check_open(loop, nullptr, &check) == VKP_ERR_INVALID);
    CHECK(vkp_health_check_open(loop, &doctor.config, nullptr) == VKP_ERR_INVALID);
    vkp_health_config config = doctor.config;
    config.on_result = nullptr;
    CHECK(vkp_health_check_open(loop, &config, &check) == VKP_ERR_INVALID);
    config = doctor.config;
    config.address = vkp_str_of(nullptr);
    CHECK(vkp_health_check_open(loop, &config, &check) == VKP_ERR_INVALID);
    for (const char *address : {"", "nonsense", "unix:", "tcp:127.0.0.1", "tcp:127.0.0.1:99999"}) {
        INFO("address " << address);
        config = doctor.config;
        config.address = vkp_str_of(address);
        CHECK(vkp_health_check_open(loop, &config, &check) == VKP_ERR_INVALID);
    }
    CHECK(check == nullptr);
    vkp_health_check_close(nullptr);
    vkp_test_rounds(loop, 3);
    CHECK(doctor.told.empty());
}

TEST_CASE("health: an answer is OK, the request is PING, and the check hangs up")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    const bool tcp = GENERATE(true, false);
    Patient patient(loop, tcp ? "tcp:127.0.0.1:0" : vkp_test_fresh_address("health"));
    patient.answer("+PONG\r\n");
    Doctor doctor;
    doctor.open(loop, patient.address);
    CHECK(doctor.told.empty()); // in a round, not inside the call
    const vkp_health health = doctor.next();
    CHECK(health.status == VKP_OK);
    CHECK(health.sys_error == 0);
    CHECK(health.failures == 0);
    CHECK(health.elapsed_ns < 30000 * vkp_test_ms);
    CHECK(patient.asked == "PING\r\n");
    vkp_test_run_until(loop, "the end", [&] { return patient.left.size() == 1; });
    CHECK(patient.left[0] == VKP_CLOSE_PEER);
    // Once means once.
    vkp_test_rounds(loop, 5);
    CHECK(doctor.told.size() == 1);
    CHECK(patient.conns.empty());
}

TEST_CASE("health: an answer in any pieces, and with more behind it, is one")
{
    vkp_test_loop loop(&vkp_backend_null);
    Patient patient(loop);
    const std::string whole =
        GENERATE(as<std::string>{}, "+PONG\r\n", "+PONG\r\n+PONG\r\n", "+PONG\r\n-ERR later\r\n");
    const size_t split = GENERATE(range(size_t{1}, size_t{7}));
    INFO("split at " << split);
    Doctor doctor;
    doctor.open(loop, patient.address);
    vkp_test_run_until(loop, "the request", [&] { return patient.asked == "PING\r\n"; });
    patient.say(patient.conns[0], whole.substr(0, split));
    vkp_test_rounds(loop, 5);
    CHECK(doctor.told.empty());
    patient.say(patient.conns[0], whole.substr(split));
    CHECK(doctor.next().status == VKP_OK);
}

TEST_CASE("health: another answer is PROTOCOL as soon as it is another")
{
    vkp_test_loop loop(&vkp_backend_null);
    Patient patient(loop);
    const std::string answer = GENERATE(as<std::string>{}, "-", "+", "+PONG\n", "+PONGS\r\n",
                                        "-LOADING wait\r\n", "HTTP/1.1 400 Bad Request\r\n");
    INFO("answer " << answer);
    patient.answer(answer);
    Doctor doctor;
    doctor.open(loop, patient.address);
    const vkp_health health = doctor.next();
    CHECK(health.failures == 1);
    if (answer == "+") { // might still have become one
        CHECK(health.status == VKP_ERR_TIMEOUT);
    } else {
        CHECK(health.status == VKP_ERR_PROTOCOL);
        CHECK(health.elapsed_ns < 1000 * vkp_test_ms);
    }
    vkp_test_run_until(loop, "the end", [&] { return patient.left.size() == 1; });
}

TEST_CASE("health: another question with another answer, as texts that are copied")
{
    vkp_test_loop loop(&vkp_backend_null);
    Patient patient(loop);
    std::string request("GET\0alive\r\n", 11);
    std::string answer("yes\0", 4);
    const bool right = GENERATE(true, false);
    patient.answer(right ? answer + " and well" : std::string("yes!"));
    Doctor doctor;
    doctor.config.request = {request.data(), request.size()};
    doctor.config.answer = {answer.data(), answer.size()};
    doctor.config.period_ms = 10;
    doctor.open(loop, patient.address);
    request.assign(request.size(), '#');
    answer.assign(answer.size(), '#');
    for (int i = 0; i < 2; i++) {
        patient.asked.clear();
        CHECK(doctor.next().status == (right ? VKP_OK : VKP_ERR_PROTOCOL));
        CHECK(patient.asked == std::string("GET\0alive\r\n", 11));
    }
}

TEST_CASE("health: nobody there is REFUSED")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    std::string address = vkp_test_fresh_address("health");
    SECTION("no file")
    {
    }
    SECTION("a file that nobody listens at")
    {
        sockaddr_un name = {};
        name.sun_family = AF_UNIX;
        std::strcpy(name.sun_path, address.c_str() + 5);
        const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
        REQUIRE(bind(fd, reinterpret_cast<sockaddr *>(&name), sizeof name) == 0);
        close(fd);
    }
    SECTION("a port that nobody listens at")
    {
        auto patient = std::make_unique<Patient>(loop, "tcp:127.0.0.1:0");
        address = patient->address;
    }
    Doctor doctor;
    doctor.open(loop, address);
    const vkp_health health = doctor.next();
    CHECK(health.status == VKP_ERR_REFUSED);
    CHECK(health.failures == 1);
    vkp_test_rounds(loop, 3);
    CHECK(doctor.told.size() == 1);
}

TEST_CASE("health: another failure of the system is SYS, with its error")
{
    static int error;
    vkp_sys sys = *vkp_sys_get_default();
    sys.connect = [](int fd, const void *address, uint32_t bytes) {
        return error != 0 ? -error : vkp_sys_get_default()->connect(fd, address, bytes);
    };
    sys.socket = [](int family, int type) {
        return error == EMFILE ? -EMFILE : vkp_sys_get_default()->socket(family, type);
    };
    error = 0;
    vkp_test_loop loop(&vkp_backend_null, &sys);
    Patient patient(loop);
    patient.answer("+PONG\r\n");
    error = GENERATE(EACCES, EMFILE);
    Doctor doctor;
    doctor.config.period_ms = 100;
    doctor.open(loop, patient.address);
    vkp_health health = doctor.next();
    CHECK(health.status == VKP_ERR_SYS);
    CHECK(health.sys_error == error);
    CHECK(doctor.next().failures == 2);
    error = 0;
    health = doctor.next();
    CHECK(health.status == VKP_OK);
    CHECK(health.sys_error == 0);
}

TEST_CASE("health: one that closes without an answer is DISCONNECTED")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    const bool tcp = GENERATE(true, false);
    Patient patient(loop, tcp ? "tcp:127.0.0.1:0" : vkp_test_fresh_address("health"));
    SECTION("at once")
    {
        patient.on_open = [](vkp_conn *conn) { vkp_conn_close(conn); };
    }
    SECTION("when asked")
    {
        patient.on_data = [](vkp_conn *conn) { vkp_conn_close(conn); };
    }
    SECTION("in the middle of the answer")
    {
        patient.on_data = [&](vkp_conn *conn) {
            patient.say(conn, "+PON");
            vkp_conn_drain(conn);
        };
    }
    Doctor doctor;
    doctor.open(loop, patient.address);
    const vkp_health health = doctor.next();
    INFO("error " << health.sys_error);
    CHECK(health.status == VKP_ERR_DISCONNECTED); // a reset, too, if the request was not read
    CHECK(health.failures == 1);
    vkp_test_rounds(loop, 3);
    CHECK(doctor.told.size() == 1);
}

TEST_CASE("health: a silent one is TIMEOUT, exactly in time")
{
    vkp_test_loop loop(&vkp_backend_null);
    Patient patient(loop);
    const uint32_t wanted = GENERATE(0u, 1u, 250u, 60000u);
    const uint64_t timeout = (wanted == 0 ? 1000 : wanted) * vkp_test_ms;
    const std::string part = GENERATE(as<std::string>{}, "", "+PON");
    patient.answer(part);
    Doctor doctor;
    doctor.config.timeout_ms = wanted;
    const uint64_t since = loop.now();
    doctor.open(loop, patient.address);
    (void)doctor.next();
    CHECK(doctor.told[0].status == VKP_ERR_TIMEOUT);
    CHECK(doctor.told[0].elapsed_ns == timeout);
    CHECK(doctor.told[0].failures == 1);
    CHECK(loop.now() == since + timeout);
    vkp_test_run_until(loop, "the end", [&] { return patient.left.size() == 1; });
    // What comes late comes to nobody.
    vkp_test_rounds(loop, 3);
    CHECK(doctor.told.size() == 1);
}

TEST_CASE("health: an address by its name")
{
    vkp_test_loop loop(&vkp_backend_null);
    Patient patient(loop, "tcp:127.0.0.1:0");
    patient.answer("+PONG\r\n");
    Doctor doctor;
    const std::string port = patient.address.substr(patient.address.rfind(':'));
    doctor.open(loop, "tcp:localhost" + port);
    CHECK(doctor.next().status == VKP_OK);
}

TEST_CASE("health: every period, one at a time, with the failures in a row")
{
    vkp_test_loop loop(&vkp_backend_null);
    auto patient = std::make_unique<Patient>(loop);
    const std::string address = patient->address;
    patient->answer("+PONG\r\n");
    Doctor doctor;
    doctor.config.period_ms = 500;
    doctor.config.timeout_ms = 200;
    doctor.open(loop, address);
    for (int i = 0; i < 3; i++) {
        CHECK(doctor.next().status == VKP_OK);
    }
    CHECK(doctor.times[1] - doctor.times[0] == 500 * vkp_test_ms);
    CHECK(doctor.times[2] - doctor.times[1] == 500 * vkp_test_ms);
    SECTION("wrong, silent, gone, back")
    {
        patient->answer("-ERR\r\n");
        CHECK(doctor.next().failures == 1);
        CHECK(doctor.next().failures == 2);
        patient->on_data = nullptr;
        CHECK(doctor.next().failures == 3);
        patient.reset();
        CHECK(doctor.next().failures == 4);
        CHECK(doctor.next().failures == 5);
        patient = std::make_unique<Patient>(loop, address);
        patient->answer("+PONG\r\n");
        CHECK(doctor.next().failures == 0);
        patient->answer("-ERR\r\n");
        CHECK(doctor.next().failures == 1);
        CHECK(doctor.statuses() == Statuses{VKP_OK, VKP_OK, VKP_OK, VKP_ERR_PROTOCOL,
                                            VKP_ERR_PROTOCOL, VKP_ERR_TIMEOUT, VKP_ERR_REFUSED,
                                            VKP_ERR_REFUSED, VKP_OK, VKP_ERR_PROTOCOL});
        for (size_t i = 1; i < doctor.times.size(); i++) {
            const uint64_t apart = doctor.times[i] - doctor.times[i - 1];
            INFO("result " << i);
            // From begin to begin: a timeout's result is late, the one after it early.
            CHECK((apart == 500 * vkp_test_ms || apart == 700 * vkp_test_ms ||
                   apart == 300 * vkp_test_ms));
        }
    }
    SECTION("a check that takes longer than the period delays the next, and they do not pile up")
    {
        Doctor slow;
        slow.config.period_ms = 50;
        slow.config.timeout_ms = 200;
        patient->on_data = nullptr;
        doctor.close();
        slow.open(loop, address);
        size_t most = 0;
        for (int i = 0; i < 5; i++) {
            const size_t before = slow.told.size();
            vkp_test_run_until(loop, "a result", [&] {
                most = std::max(most, patient->conns.size());
                return slow.told.size() > before;
            });
        }
        CHECK(most == 1);
        CHECK(slow.told[4].failures == 5);
        CHECK(slow.times[4] - slow.times[0] == 4 * 200 * vkp_test_ms);
    }
    SECTION("until its close")
    {
        doctor.close();
        CHECK(vkp_loop_get_deadline_ns(loop) == VKP_FOREVER);
        pass(loop, 5000);
        CHECK(doctor.told.size() == 3);
    }
}

TEST_CASE("health: closed anywhere, no result follows")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    Patient patient(loop);
    Doctor doctor;
    doctor.config.period_ms = GENERATE(0u, 1u);
    size_t told = 0;
    SECTION("before it began")
    {
        doctor.open(loop, patient.address);
        doctor.close();
    }
    SECTION("when it was accepted")
    {
        patient.on_open = [&](vkp_conn *) { doctor.close(); };
        doctor.open(loop, patient.address);
        vkp_test_run_until(loop, "the end", [&] { return doctor.check == nullptr; });
    }
    SECTION("when it asked")
    {
        patient.on_data = [&](vkp_conn *conn) {
            patient.say(conn, "+PONG\r\n");
            doctor.close();
        };
        doctor.open(loop, patient.address);
        vkp_test_run_until(loop, "the end", [&] { return doctor.check == nullptr; });
    }
    SECTION("in on_result: an answer")
    {
        patient.answer("+PONG\r\n");
        doctor.hook = [&] { doctor.close(); };
        doctor.open(loop, patient.address);
        CHECK(doctor.next().status == VKP_OK);
        told = 1;
    }
    SECTION("in on_result: another answer")
    {
        patient.answer("-ERR\r\n");
        doctor.hook = [&] { doctor.close(); };
        doctor.open(loop, patient.address);
        CHECK(doctor.next().status == VKP_ERR_PROTOCOL);
        told = 1;
    }
    SECTION("in on_result: nobody there")
    {
        doctor.hook = [&] { doctor.close(); };
        doctor.open(loop, vkp_test_fresh_address("health"));
        CHECK(doctor.next().status == VKP_ERR_REFUSED);
        told = 1;
    }
    SECTION("in on_result: a disconnect")
    {
        patient.on_data = [](vkp_conn *conn) { vkp_conn_close(conn); };
        doctor.hook = [&] { doctor.close(); };
        doctor.open(loop, patient.address);
        CHECK(doctor.next().status != VKP_OK);
        told = 1;
    }
    SECTION("in on_result: silence")
    {
        doctor.config.timeout_ms = 1;
        doctor.hook = [&] { doctor.close(); };
        doctor.open(loop, patient.address);
        CHECK(doctor.next().status == VKP_ERR_TIMEOUT);
        told = 1;
    }
    vkp_test_rounds(loop, 5);
    CHECK(doctor.told.size() == told);
    CHECK(vkp_loop_get_deadline_ns(loop) == VKP_FOREVER);
    vkp_test_run_until(loop, "the end", [&] { return patient.conns.empty(); });
}

TEST_CASE("health: the loop closes under it")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    Patient patient(loop);
    Doctor doctor;
    doctor.config.period_ms = GENERATE(0u, 1000u);
    doctor.config.timeout_ms = 60000;
    doctor.open(loop, patient.address);
    SECTION("before it began")
    {
    }
    SECTION("while it waits for the answer")
    {
        vkp_test_run_until(loop, "the request", [&] { return !patient.asked.empty(); });
    }
    SECTION("between two checks")
    {
        patient.answer("+PONG\r\n");
        CHECK(doctor.next().status == VKP_OK);
    }
    const size_t told = doctor.told.size();
    loop.close();
    CHECK(doctor.told.size() == told);
    doctor.close();
    Doctor late;
    vkp_loop *closed = nullptr;
    vkp_loop_config config = {};
    config.backend = backend;
    REQUIRE(vkp_loop_open(&config, &closed) == VKP_OK);
    vkp_loop_close(closed);
    CHECK(late.try_open(closed, patient.address) == VKP_ERR_CLOSED);
    vkp_loop_unref(closed);
}

TEST_CASE("health: every allocation may fail: one result per check, and it goes on")
{
    const vkp_test_fault fault = GENERATE(VKP_TEST_FAULT_ONCE, VKP_TEST_FAULT_FROM);
    const bool close_in_result = GENERATE(false, true);
    vkp_test_loop loop(&vkp_backend_null);
    vkp_test_loop elsewhere(&vkp_backend_null); // the server has all it needs
    Patient patient(elsewhere);
    patient.answer("+PONG\r\n");
    uint64_t k = 1;
    uint64_t in_open = 0;
    uint64_t in_result = 0;
    for (;; k++) {
        INFO("allocation " << k);
        Doctor doctor;
        doctor.config.period_ms = 10;
        doctor.config.timeout_ms = 100;
        if (close_in_result) {
            doctor.hook = [&] { doctor.close(); };
        }
        const int fds = vkp_test_fd_count();
        const uint64_t failures = vkp_test_env_failures(&loop.test);
        vkp_test_env_fault(&loop.test, fault, k);
        const vkp_status status = doctor.try_open(loop, patient.address);
        if (status != VKP_OK) {
            vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
            CHECK(status == VKP_ERR_NOMEM);
            CHECK(doctor.check == nullptr);
            vkp_test_rounds(loop, 3);
            CHECK(doctor.told.empty());
            CHECK(vkp_test_fd_count() == fds);
            in_open++;
            continue;
        }
        vkp_test_run_until(loop, "a result", [&] {
            elsewhere.round();
            return !doctor.told.empty();
        });
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
        const bool failed = vkp_test_env_failures(&loop.test) > failures;
        if (doctor.told[0].status != VKP_OK) {
            CHECK(doctor.told[0].status == VKP_ERR_NOMEM);
            in_result++;
        }
        CHECK(doctor.told.size() == 1);
        if (!close_in_result) {
            vkp_test_run_until(loop, "the next", [&] {
                elsewhere.round();
                return doctor.told.size() == 2;
            });
            CHECK(doctor.told[1].status == VKP_OK);
            doctor.close();
        }
        vkp_test_run_until(elsewhere, "the ends", [&] { return patient.conns.empty(); });
        loop.round();
        CHECK(vkp_test_fd_count() == fds);
        if (!failed) {
            break;
        }
    }
    CHECK(in_open > 0);
    CHECK(in_result > 0);
}

TEST_CASE("health: a real server, well, dead, and back")
{
    if (vkp_test_server_program() == nullptr) {
        WARN("left out: there is no valkey-server and no redis-server");
        return;
    }
    struct ServerDeleter {
        void operator()(vkp_test_server *server) const
        {
            vkp_test_server_close(server);
        }
    };
    const bool tcp = GENERATE(true, false);
    std::unique_ptr<vkp_test_server, ServerDeleter> server(vkp_test_server_open(nullptr));
    vkp_test_loop loop;
    Doctor doctor;
    doctor.config.period_ms = 2;
    doctor.config.timeout_ms = 30000;
    doctor.open(loop, tcp ? vkp_test_server_tcp(server.get()) : vkp_test_server_unix(server.get()));
    CHECK(doctor.next().status == VKP_OK);
    CHECK(doctor.next().status == VKP_OK);
    vkp_test_server_kill(server.get());
    vkp_test_run_until(loop, "its absence", [&] { return doctor.told.back().failures >= 3; });
    CHECK(doctor.told.back().status == VKP_ERR_REFUSED);
    vkp_test_server_restart(server.get());
    vkp_test_run_until(loop, "its return", [&] { return doctor.told.back().status == VKP_OK; });
    CHECK(doctor.told.back().failures == 0);
}

TEST_CASE("health: a real server that wants a password first gives another answer")
{
    if (vkp_test_server_program() == nullptr) {
        WARN("left out: there is no valkey-server and no redis-server");
        return;
    }
    const char *options[] = {"--requirepass", "s3cret", nullptr};
    vkp_test_server *server = vkp_test_server_open(options);
    vkp_test_loop loop;
    Doctor doctor;
    doctor.config.timeout_ms = 30000;
    SECTION("PING alone")
    {
        doctor.open(loop, vkp_test_server_unix(server));
        CHECK(doctor.next().status == VKP_ERR_PROTOCOL);
    }
    SECTION("with it")
    {
        doctor.config.request = vkp_str_of("AUTH s3cret\r\nPING\r\n");
        doctor.config.answer = vkp_str_of("+OK\r\n+PONG\r\n");
        doctor.open(loop, vkp_test_server_unix(server));
        CHECK(doctor.next().status == VKP_OK);
    }
    vkp_test_server_close(server);
}

TEST_CASE("health: a relay answers, until it drains")
{
    vkp_test_loop loop;
    vkp_loop *view = loop;
    vkp_relay_config config = {};
    config.loops = &view;
    config.env = &loop.test.env;
    vkp_relay *relay = nullptr;
    REQUIRE(vkp_relay_open(&config, &relay) == VKP_OK);
    const std::string address = vkp_test_fresh_address("health");
    REQUIRE(vkp_relay_listen(relay, vkp_str_of(address.c_str()), nullptr) == VKP_OK);
    Doctor doctor;
    doctor.config.period_ms = 1;
    doctor.config.timeout_ms = 30000;
    doctor.open(loop, address);
    CHECK(doctor.next().status == VKP_OK);
    CHECK(doctor.next().status == VKP_OK);
    bool drained = false;
    vkp_relay_drain(
        relay, [](void *user) { *static_cast<bool *>(user) = true; }, &drained,
        vkp_test_deadline());
    vkp_test_run_until(loop, "the drain", [&] { return drained; });
    vkp_test_run_until(loop, "its absence", [&] { return doctor.told.back().failures >= 2; });
    CHECK(doctor.told.back().status == VKP_ERR_REFUSED);
    doctor.close();
    vkp_relay_unref(relay);
}
