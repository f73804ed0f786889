/* One table of verbs: every close, unref and deinit that the header declares accepts NULL, every
   close may come twice and frees nothing. The list is made from the declarations
   (scripts/verbs.sh); a close of a type that nothing below makes does not compile.
   SPDX-License-Identifier: MIT                                                                  */
#include "support/catch.hpp"

#include <string>
#include <unistd.h>

#include "support/support.h"

namespace {

// An open object of a type, and what it needs around it.
struct World {
    vkp_test_env test;
    vkp_loop *loop = nullptr;
    World()
    {
        vkp_test_env_init(&test);
        vkp_loop_config config = {};
        config.backend = &vkp_backend_poll;
        config.env = &test.env;
        if (vkp_loop_open(&config, &loop) != VKP_OK) {
            vkp_test_fail("no loop");
        }
    }
    ~World()
    {
        vkp_loop_close(loop);
        vkp_loop_unref(loop);
        vkp_test_env_deinit(&test); // aborts if anything is left
    }
    World(const World &) = delete;
    World &operator=(const World &) = delete;
};

template <typename T>
struct Made; // a type without a maker here: add one

template <>
struct Made<vkp_loop> {
    vkp_loop *object;
    explicit Made(World &world) : object(vkp_loop_ref(world.loop))
    {
    }
    ~Made()
    {
        CHECK(vkp_loop_post(
                  object, [](void *) {}, nullptr) == VKP_ERR_CLOSED);
        vkp_loop_unref(object);
    }
};

template <>
struct Made<vkp_client> {
    vkp_client *object = nullptr;
    explicit Made(World &world)
    {
        vkp_client_config config = {};
        config.address = vkp_str_of("unix:/nobody/is/here");
        REQUIRE(vkp_client_open(world.loop, &config, &object) == VKP_OK);
    }
    ~Made()
    {
        CHECK(vkp_client_get_state(object) == VKP_CLIENT_CLOSED);
        vkp_client_unref(object);
    }
};

template <>
struct Made<vkp_conn> {
    vkp_conn *object = nullptr;
    int peer;
    explicit Made(World &world)
    {
        static const vkp_conn_ops ops = {};
        int fds[2];
        vkp_conn_config config = {};
        config.ops = &ops;
        vkp_test_socket_pair(fds);
        REQUIRE(vkp_conn_open(world.loop, fds[0], &config, &object) == VKP_OK);
        peer = fds[1];
    }
    ~Made()
    {
        CHECK(!vkp_conn_is_open(object));
        vkp_conn_unref(object);
        close(peer);
    }
};

template <>
struct Made<vkp_listener> {
    vkp_listener *object = nullptr;
    explicit Made(World &world)
    {
        static const vkp_conn_ops ops = {};
        vkp_listener_config config = {};
        config.address = vkp_str_of("tcp:127.0.0.1:0");
        config.conn.ops = &ops;
        REQUIRE(vkp_listener_open(world.loop, &config, &object) == VKP_OK);
    }
    ~Made()
    {
        CHECK(std::string(vkp_listener_get_address(object)).find("tcp:") == 0);
        vkp_listener_unref(object);
    }
};

template <>
struct Made<vkp_health_check> {
    vkp_health_check *object = nullptr;
    explicit Made(World &world)
    {
        vkp_health_config config = {};
        config.address = vkp_str_of("unix:/nobody/is/here");
        config.on_result = [](void *, const vkp_health *) {};
        REQUIRE(vkp_health_check_open(world.loop, &config, &object) == VKP_OK);
    }
    ~Made()
    {
        vkp_health_check_unref(object);
    }
};

template <>
struct Made<vkp_http> {
    vkp_http *object = nullptr;
    explicit Made(World &world)
    {
        vkp_http_config config = {};
        config.address = vkp_str_of("tcp:127.0.0.1:0");
        config.on_request = [](void *, const vkp_http_request *, vkp_http_call *call) {
            vkp_http_response response = {};
            vkp_http_answer(call, &response);
        };
        REQUIRE(vkp_http_open(world.loop, &config, &object) == VKP_OK);
    }
    ~Made()
    {
        CHECK(std::string(vkp_http_get_address(object)).find("tcp:") == 0);
        vkp_http_unref(object);
    }
};

template <>
struct Made<vkp_sync> {
    vkp_sync *object = nullptr;
    explicit Made(World &)
    {
        vkp_sync_config config = {};
        config.backend = *vkp_test_backends();
        config.client.address = vkp_str_of("unix:/nobody/is/here");
        REQUIRE(vkp_sync_open(&config, &object) == VKP_OK);
    }
    ~Made()
    {
        vkp_sync_unref(object);
    }
};

template <>
struct Made<vkp_resolver> {
    vkp_resolver *object = nullptr;
    explicit Made(World &)
    {
        REQUIRE(vkp_resolver_open(nullptr, &object) == VKP_OK);
    }
    ~Made()
    {
        vkp_resolver_unref(object);
    }
};

template <>
struct Made<vkp_mpsc_rx> {
    vkp_mpsc_tx *tx = nullptr;
    vkp_mpsc_rx *object = nullptr;
    explicit Made(World &world)
    {
        vkp_mpsc_config config = {};
        config.elem_bytes = 1;
        config.env = &world.test.env;
        REQUIRE(vkp_mpsc_open(&config, &tx, &object) == VKP_OK);
    }
    ~Made()
    {
        CHECK(vkp_mpsc_try_send(tx, "x") == VKP_ERR_CLOSED);
        vkp_mpsc_tx_unref(tx);
        vkp_mpsc_rx_unref(object);
    }
};

template <>
struct Made<vkp_oneshot> {
    vkp_oneshot *object = nullptr;
    explicit Made(World &world)
    {
        REQUIRE(vkp_oneshot_open(&world.test.env, 1, nullptr, nullptr, &object) == VKP_OK);
    }
    ~Made()
    {
        CHECK(vkp_oneshot_send(object, "x") == VKP_ERR_CLOSED);
        vkp_oneshot_tx_unref(object);
        vkp_oneshot_rx_unref(object);
    }
};

template <>
struct Made<vkp_handler> {
    Made<vkp_mpsc_rx> channel;
    vkp_handler *object = nullptr;
    explicit Made(World &world) : channel(world)
    {
        REQUIRE(vkp_test_handle(
                    world.loop, channel.object, [](void *) {}, nullptr, &object) == VKP_OK);
    }
    ~Made()
    {
        vkp_mpsc_close(channel.object);
        vkp_handler_unref(object);
    }
};

// The maker uses the object once more at its end: freed memory is AddressSanitizer's to find.
template <typename T>
void close_twice(const char *name, void (*close)(T *object))
{
    INFO(name);
    for (bool before_the_loop : {true, false}) {
        World world;
        Made<T> made(world);
        if (!before_the_loop) {
            vkp_loop_close(world.loop);
        }
        close(made.object);
        close(made.object);
    }
}

} // namespace

TEST_CASE("verbs: every close may come twice, and frees nothing that the handle needs")
{
    size_t count = 0;
#define CLOSE(function, type)               \
    close_twice<type>(#function, function); \
    count++;
#define UNREF(function, type)
#define DEINIT(function, type)
#include "verbs.inc"
#undef CLOSE
#undef UNREF
#undef DEINIT
    CHECK(count >= 8);
}

TEST_CASE("verbs: every close, unref and deinit ignores NULL")
{
    size_t count = 0;
#define CLOSE(function, type)                   \
    {                                           \
        INFO(#function);                        \
        function(static_cast<type *>(nullptr)); \
        count++;                                \
    }
#define UNREF(function, type) CLOSE(function, type)
#define DEINIT(function, type) CLOSE(function, type)
#include "verbs.inc"
#undef CLOSE
#undef UNREF
#undef DEINIT
    CHECK(count >= 35);
}
