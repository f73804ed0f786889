// SPDX-License-Identifier: MIT
//
// A program of examples/ under test, and a peer that talks to it.
#ifndef VKP_TEST_PROGRAM_H
#define VKP_TEST_PROGRAM_H

#include "catch.hpp"

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include <signal.h>
#include <unistd.h>

#include "support.h"

struct PeerDeleter {
    void operator()(vkp_test_peer *peer) const
    {
        vkp_test_peer_close(peer);
    }
};
using Peer = std::unique_ptr<vkp_test_peer, PeerDeleter>;

// "" where it is not built.
inline std::string program(const std::string &name)
{
    const char *folder = std::getenv("VKP_TEST_BUILD_DIR");
    std::string path = std::string(folder ? folder : ".") + "/examples/" + name;
    return vkp_test_exists(path.c_str()) ? path : "";
}

#define NEEDS(path)                                  \
    if ((path).empty()) {                            \
        WARN("left out: the example was not built"); \
        return;                                      \
    }

// A program under test, and what it prints.
class Running {
  public:
    explicit Running(const std::vector<std::string> &words)
    {
        std::vector<const char *> argv;
        for (const std::string &word : words) {
            argv.push_back(word.c_str());
        }
        argv.push_back(nullptr);
        pid_ = vkp_test_spawn(argv.data(), &out_);
    }
    ~Running()
    {
        close(out_);
        if (pid_ > 0) {
            vkp_test_reap(pid_, SIGKILL);
        }
    }
    Running(const Running &) = delete;
    Running &operator=(const Running &) = delete;
    // The next line with its end; "" at the end of the output.
    std::string line()
    {
        std::string text;
        char byte = 0;
        while (byte != '\n' && read(out_, &byte, 1) == 1) {
            text += byte;
        }
        return text;
    }
    void send_signal(int number)
    {
        REQUIRE(kill(pid_, number) == 0);
    }
    int wait(int signal_number = 0)
    {
        const int code = vkp_test_reap(pid_, signal_number);
        pid_ = -1;
        return code;
    }

  private:
    int pid_;
    int out_ = -1;
};

inline std::string text_of(vkp_test_peer *peer, size_t len)
{
    const char *text = vkp_test_peer_read(peer, len);
    return text ? std::string(text, len) : "";
}

#endif
