/* What the tests of ref-counted sockets share: a registry and a folder that check what they leave,
   what is on disk, hooks before each system call, threads and processes that stop where a test
   wants them.
   SPDX-License-Identifier: MIT                                                                  */
#ifndef VKP_TEST_SOCKET_PROBE_H
#define VKP_TEST_SOCKET_PROBE_H

#include "support/support.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

/* --------------------------------------------------------------------------------------
   Hooks                                                                                     */

enum class vkp_test_call {
    clock_ns,
    process_id,
    user_id,
    socket,
    bind,
    listen,
    connect,
    prepare,
    close,
    lock_file,
    identify,
    chmod,
    unlink
};

struct vkp_test_step {
    vkp_test_call call;
    std::string path; /* of the file; of an abstract name, with '@' first; else empty */
    int fd;           /* or -1 */

    bool is(vkp_test_call what, const std::string &where) const
    {
        return call == what && path == where;
    }
    /* The calls that the system may refuse; a refused close closes all the same. */
    bool can_fail() const
    {
        return call != vkp_test_call::clock_ns && call != vkp_test_call::process_id &&
               call != vkp_test_call::user_id;
    }
};

/* A table whose calls ask `before` first, as long as this object is there: one at a time. Set the
   functions while no other thread is in the library. What `before` calls itself asks it again.  */
class vkp_test_hooks {
  public:
    vkp_test_hooks()
    {
        if (now_ != nullptr) {
            vkp_test_fail("two sets of hooks at once");
        }
        now_ = this;
    }
    ~vkp_test_hooks()
    {
        now_ = nullptr;
    }
    vkp_test_hooks(const vkp_test_hooks &) = delete;
    vkp_test_hooks &operator=(const vkp_test_hooks &) = delete;

    /* 0: the call is made; a negated errno: it fails with that. */
    std::function<int(const vkp_test_step &)> before;
    std::function<uint64_t()> clock;
    std::function<uint64_t()> random;

    /* Once, before the first call of this kind (with this path). */
    void at(vkp_test_call call, std::function<void()> what, const std::string &path = std::string())
    {
        before = [this, call, what = std::move(what), path](const vkp_test_step &step) {
            if (step.call == call && (path.empty() || step.path == path)) {
                before = nullptr; /* the table runs a copy of this function */
                what();
            }
            return 0;
        };
    }
    /* The k-th call from now that can fail does, with this errno. */
    void fail(int k, int error)
    {
        calls_ = 0;
        failed_ = false;
        before = [this, k, error](const vkp_test_step &step) {
            if (!step.can_fail() || ++calls_ != k) {
                return 0;
            }
            failed_ = true;
            failed_step_ = step;
            return -error;
        };
    }
    void heal()
    {
        before = nullptr;
    }
    bool failed() const
    {
        return failed_;
    }
    const vkp_test_step &failed_step() const
    {
        return failed_step_;
    }

    const vkp_sys *sys() const
    {
        static const vkp_sys table = make();
        return &table;
    }

  private:
    template <typename Real>
    static int through(vkp_test_call call, const std::string &path, int fd, Real real)
    {
        if (now_ != nullptr && now_->before) {
            const vkp_test_step step = {call, path, fd};
            /* `before` may replace itself */
            const std::function<int(const vkp_test_step &)> ask = now_->before;
            const int result = ask(step);
            if (result != 0 && step.can_fail()) {
                if (call == vkp_test_call::close) {
                    (void)real();
                }
                return result;
            }
        }
        return real();
    }
    static std::string path_of(const void *address, uint32_t bytes)
    {
        sockaddr_un name;
        std::memset(&name, 0, sizeof name);
        std::memcpy(&name, address, std::min<size_t>(bytes, sizeof name));
        if (name.sun_family != AF_UNIX) {
            return std::string();
        }
        const bool is_abstract = name.sun_path[0] == '\0';
        const char *text = name.sun_path + (is_abstract ? 1 : 0);
        const size_t most = sizeof name.sun_path - (is_abstract ? 1 : 0);
        return (is_abstract ? "@" : "") + std::string(text, strnlen(text, most));
    }
    static vkp_sys make()
    {
        vkp_sys table = *vkp_sys_get_default();
        table.clock_ns = [] {
            (void)through(vkp_test_call::clock_ns, "", -1, [] { return 0; });
            return now_ != nullptr && now_->clock ? now_->clock()
                                                  : vkp_sys_get_default()->clock_ns();
        };
        table.random_u64 = [] {
            return now_ != nullptr && now_->random ? now_->random()
                                                   : vkp_sys_get_default()->random_u64();
        };
        table.process_id = [] {
            return through(vkp_test_call::process_id, "", -1,
                           [] { return vkp_sys_get_default()->process_id(); });
        };
        table.user_id = [] {
            (void)through(vkp_test_call::user_id, "", -1, [] { return 0; });
            return vkp_sys_get_default()->user_id();
        };
        table.socket = [](int family, int type) {
            return through(vkp_test_call::socket, "", -1,
                           [&] { return vkp_sys_get_default()->socket(family, type); });
        };
        table.bind = [](int fd, const void *address, uint32_t bytes, uint32_t mode) {
            return through(vkp_test_call::bind, path_of(address, bytes), fd,
                           [&] { return vkp_sys_get_default()->bind(fd, address, bytes, mode); });
        };
        table.listen = [](int fd, int backlog) {
            return through(vkp_test_call::listen, "", fd,
                           [&] { return vkp_sys_get_default()->listen(fd, backlog); });
        };
        table.connect = [](int fd, const void *address, uint32_t bytes) {
            return through(vkp_test_call::connect, path_of(address, bytes), fd,
                           [&] { return vkp_sys_get_default()->connect(fd, address, bytes); });
        };
        table.prepare = [](int fd) {
            return through(vkp_test_call::prepare, "", fd,
                           [&] { return vkp_sys_get_default()->prepare(fd); });
        };
        table.close = [](int fd) {
            return through(vkp_test_call::close, "", fd,
                           [&] { return vkp_sys_get_default()->close(fd); });
        };
        table.lock_file = [](const char *path, vkp_file_id *id) {
            return through(vkp_test_call::lock_file, path, -1,
                           [&] { return vkp_sys_get_default()->lock_file(path, id); });
        };
        table.identify = [](const char *path, vkp_file_id *id) {
            return through(vkp_test_call::identify, path, -1,
                           [&] { return vkp_sys_get_default()->identify(path, id); });
        };
        table.chmod = [](const char *path, uint32_t mode) {
            return through(vkp_test_call::chmod, path, -1,
                           [&] { return vkp_sys_get_default()->chmod(path, mode); });
        };
        table.unlink = [](const char *path) {
            return through(vkp_test_call::unlink, path, -1,
                           [&] { return vkp_sys_get_default()->unlink(path); });
        };
        return table;
    }

    static inline vkp_test_hooks *now_ = nullptr;
    int calls_ = 0;
    bool failed_ = false;
    vkp_test_step failed_step_ = {vkp_test_call::socket, "", -1};
};

/* --------------------------------------------------------------------------------------
   On disk                                                                                   */

inline std::string vkp_test_lock_of(const std::string &path)
{
    return path + ".lock";
}

inline bool vkp_test_has_lock(const std::string &path)
{
    return vkp_test_exists(vkp_test_lock_of(path).c_str());
}

inline bool vkp_test_answers(const std::string &path)
{
    const int fd = vkp_test_connect(("unix:" + path).c_str());
    if (fd >= 0) {
        close(fd);
    }
    return fd >= 0;
}

inline struct stat vkp_test_look(const std::string &path)
{
    struct stat info;
    std::memset(&info, 0, sizeof info);
    if (lstat(path.c_str(), &info) != 0) {
        vkp_test_fail("nothing at %s", path.c_str());
    }
    return info;
}

inline mode_t vkp_test_mode(const std::string &path)
{
    return vkp_test_look(path).st_mode & 07777;
}

inline sockaddr_un vkp_test_sockaddr(const std::string &path)
{
    sockaddr_un address;
    std::memset(&address, 0, sizeof address);
    address.sun_family = AF_UNIX;
    if (path.size() >= sizeof address.sun_path) {
        vkp_test_fail("%s fits no address", path.c_str());
    }
    std::memcpy(address.sun_path, path.c_str(), path.size());
    return address;
}

/* A socket that somebody else bound, without a lock file; backlog -1: not listening. */
inline int vkp_test_foreign_socket(const std::string &path, int backlog)
{
    const sockaddr_un address = vkp_test_sockaddr(path);
    const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0 || bind(fd, reinterpret_cast<const sockaddr *>(&address), sizeof address) != 0 ||
        (backlog >= 0 && listen(fd, backlog) != 0)) {
        vkp_test_fail("no foreign socket at %s: %s", path.c_str(), strerror(errno));
    }
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    return fd;
}

inline void vkp_test_write_file(const std::string &path)
{
    std::FILE *file = std::fopen(path.c_str(), "w");
    if (file == nullptr || std::fputs("mine", file) < 0 || std::fclose(file) != 0) {
        vkp_test_fail("cannot write %s", path.c_str());
    }
}

/* A folder of a test's own, so that everything in it is the test's. */
class vkp_test_folder {
  public:
    vkp_test_folder() : path_(vkp_test_fresh_path("d"))
    {
        if (mkdir(path_.c_str(), 0700) != 0) {
            vkp_test_fail("mkdir %s: %s", path_.c_str(), strerror(errno));
        }
    }
    const std::string &path() const
    {
        return path_;
    }
    std::string file(const std::string &name = "s") const
    {
        return path_ + "/" + name;
    }
    std::vector<std::string> names() const /* in order */
    {
        std::vector<std::string> found;
        DIR *dir = opendir(path_.c_str());
        if (dir == nullptr) {
            vkp_test_fail("opendir %s: %s", path_.c_str(), strerror(errno));
        }
        for (const dirent *each = readdir(dir); each != nullptr; each = readdir(dir)) {
            const std::string name = each->d_name;
            if (name != "." && name != "..") {
                found.push_back(name);
            }
        }
        closedir(dir);
        std::sort(found.begin(), found.end());
        return found;
    }
    bool is_empty() const
    {
        return names().empty();
    }

  private:
    std::string path_;
};

/* --------------------------------------------------------------------------------------
   Registries                                                                                */

/* Checks at its end that it gave its memory back. One with timers belongs to its loop until that
   closes, which is done here: declare it after the loop.                                        */
class vkp_test_registry {
  public:
    explicit vkp_test_registry(const vkp_sys *sys = nullptr)
        : vkp_test_registry(vkp_registry_config{}, sys)
    {
    }
    explicit vkp_test_registry(vkp_registry_config config, const vkp_sys *sys = nullptr)
        : fds_before_(vkp_test_fd_count())
    {
        vkp_test_env_init(&test);
        test.env.sys = sys;
        config.env = &test.env;
        const vkp_status status = vkp_registry_open(&config, &registry_);
        if (status != VKP_OK) {
            vkp_test_fail("no registry: %s", vkp_status_str(status));
        }
        loop_ = config.loop != nullptr ? vkp_loop_ref(config.loop) : nullptr;
    }
    ~vkp_test_registry()
    {
        vkp_registry_unref(registry_);
        if (loop_ != nullptr) {
            vkp_loop_close(loop_);
            vkp_loop_unref(loop_);
        }
        vkp_test_env_deinit(&test);
    }
    vkp_test_registry(const vkp_test_registry &) = delete;
    vkp_test_registry &operator=(const vkp_test_registry &) = delete;
    operator vkp_registry *() const
    {
        return registry_;
    }
    size_t count() const
    {
        return vkp_registry_get_count(registry_);
    }
    vkp_registry_stats stats() const
    {
        vkp_registry_stats stats;
        vkp_registry_get_stats(registry_, &stats);
        return stats;
    }
    int fds_more() const
    {
        return vkp_test_fd_count() - fds_before_;
    }
    vkp_socket *make(const std::string &path)
    {
        return made(path.c_str());
    }
    vkp_socket *make_unique()
    {
        return made(nullptr);
    }

    vkp_test_env test;

  private:
    vkp_socket *made(const char *path)
    {
        vkp_socket *sock = nullptr;
        const vkp_status status = vkp_socket_open(registry_, vkp_str_of(path), &sock);
        if (status != VKP_OK) {
            vkp_test_fail("no socket at %s: %s", path != nullptr ? path : "a name of its own",
                          vkp_status_str(status));
        }
        return sock;
    }

    int fds_before_;
    vkp_registry *registry_ = nullptr;
    vkp_loop *loop_ = nullptr;
};

/* What another program would get for the path now, and gives back at once. */
inline vkp_status vkp_test_ask_elsewhere(const std::string &path)
{
    vkp_registry *registry = nullptr;
    vkp_socket *sock = nullptr;
    if (vkp_registry_open(nullptr, &registry) != VKP_OK) {
        vkp_test_fail("no registry");
    }
    const vkp_status status = vkp_socket_open(registry, vkp_str_of(path.c_str()), &sock);
    if (status == VKP_OK) {
        vkp_socket_unref(sock);
    }
    vkp_registry_unref(registry);
    return status;
}

/* --------------------------------------------------------------------------------------
   Threads                                                                                   */

inline void vkp_test_run_threads(int count, const std::function<void(int)> &what)
{
    std::vector<std::thread> threads;
    for (int i = 0; i < count; i++) {
        threads.emplace_back([&what, i] { what(i); });
    }
    for (std::thread &thread : threads) {
        thread.join();
    }
}

/* A place where a thread stops until it is let go. */
class vkp_test_stop {
  public:
    /* The thread that stops. */
    void arrive()
    {
        state_.store(1);
        await(2);
    }
    /* Another: returns when it stands there, or, with false, when it ended without. */
    bool await_arrival(const std::atomic<bool> &ended)
    {
        const uint64_t deadline = vkp_test_deadline();
        while (state_.load() == 0 && !ended.load()) {
            check(deadline);
        }
        return state_.load() == 1;
    }
    void let_go()
    {
        state_.store(2);
    }

  private:
    void await(int state)
    {
        const uint64_t deadline = vkp_test_deadline();
        while (state_.load() < state) {
            check(deadline);
        }
    }
    static void check(uint64_t deadline)
    {
        if (vkp_now_ns() > deadline) {
            vkp_test_fail("a thread that never got where it was to stop, or was never let go");
        }
        sched_yield();
    }
    std::atomic<int> state_{0};
};

/* Let other threads run until done(), or for a while: nothing tells that a thread waits for a
   lock. Callers may not depend on which it was.                                                 */
template <typename Done>
void vkp_test_let_run(Done done)
{
    for (int i = 0; i < 2000 && !done(); i++) {
        sched_yield();
    }
}

/* --------------------------------------------------------------------------------------
   Processes                                                                                 */

/* A forked child that runs what() and ends with its result, without exit handlers. The two talk
   by single characters. A child that is still there at the end is killed.                       */
class vkp_test_child {
  public:
    explicit vkp_test_child(const std::function<int()> &what)
    {
        int up[2];
        int down[2];
        if (pipe(up) != 0 || pipe(down) != 0) {
            vkp_test_fail("pipe: %s", strerror(errno));
        }
        /* what is in the buffers would be printed twice */
        std::fflush(nullptr);
        pid_ = fork();
        if (pid_ < 0) {
            vkp_test_fail("fork: %s", strerror(errno));
        }
        if (pid_ == 0) {
            close(up[0]);
            close(down[1]);
            out_of_child_ = up[1];
            in_of_child_ = down[0];
            /* the test program's handlers would report the child's end as the test's */
            for (int number : {SIGABRT, SIGFPE, SIGILL, SIGINT, SIGSEGV, SIGTERM}) {
                signal(number, SIG_DFL);
            }
            _exit(what());
        }
        close(up[1]);
        close(down[0]);
        in_ = up[0];
        out_ = down[1];
        fcntl(in_, F_SETFD, FD_CLOEXEC);
        fcntl(out_, F_SETFD, FD_CLOEXEC);
    }
    ~vkp_test_child()
    {
        if (!ended_) {
            end(SIGKILL);
        }
        close(in_);
        close(out_);
    }
    vkp_test_child(const vkp_test_child &) = delete;
    vkp_test_child &operator=(const vkp_test_child &) = delete;

    /* In the child. */
    static void say(char word)
    {
        put(out_of_child_, word);
    }
    static char listen()
    {
        return get(in_of_child_);
    }
    /* In the parent. hear gives 0 when the child ended instead. */
    char hear() const
    {
        return get(in_);
    }
    void tell(char word) const
    {
        put(out_, word);
    }
    int pid() const
    {
        return pid_;
    }
    /* Its result, or 128 + signal. */
    int end(int signal_number = 0)
    {
        ended_ = true;
        return vkp_test_reap(pid_, signal_number);
    }

  private:
    static void put(int fd, char word)
    {
        if (write(fd, &word, 1) != 1) {
            vkp_test_fail("the other process is gone");
        }
    }
    static char get(int fd)
    {
        char word = 0;
        while (read(fd, &word, 1) < 0 && errno == EINTR) {
        }
        return word;
    }

    static inline int out_of_child_ = -1;
    static inline int in_of_child_ = -1;
    int pid_ = -1;
    int in_ = -1;
    int out_ = -1;
    bool ended_ = false;
};

/* In a child, whose result tells that it failed; the assertions are the parent's alone. */
#define VKP_TEST_EXPECT(condition)                                                           \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            std::fprintf(stderr, "%s:%d: in a child: %s\n", __FILE__, __LINE__, #condition); \
            return 1;                                                                        \
        }                                                                                    \
    } while (false)

/* For a child: serves the path, says 's', and ends when it is killed. */
inline int vkp_test_serve(const std::string &path)
{
    vkp_registry *registry = nullptr;
    vkp_socket *sock = nullptr;
    if (vkp_registry_open(nullptr, &registry) != VKP_OK ||
        vkp_socket_open(registry, vkp_str_of(path.c_str()), &sock) != VKP_OK) {
        return 1;
    }
    vkp_test_child::say('s');
    for (;;) {
        pause();
    }
}

/* What a process that was killed leaves at the path. */
inline void vkp_test_leave_corpse(const std::string &path)
{
    vkp_test_child child([&] { return vkp_test_serve(path); });
    if (child.hear() != 's' || child.end(SIGKILL) != 128 + SIGKILL) {
        vkp_test_fail("no dead process's socket at %s", path.c_str());
    }
}

#endif /* VKP_TEST_SOCKET_PROBE_H */
