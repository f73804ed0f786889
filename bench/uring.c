/* uring [rounds [part of a group's name]]: what io_uring's calls cost beside the system's own.
   SPDX-License-Identifier: MIT

   One thread. Send: 64 bytes to each of 100 sockets, by one call each, or by one submit of all,
   on the clock; the other ends are read off it. Receive: the same 64 bytes are written and read,
   all on the clock, since a ring does a part of its work inside of the write that wakes it.
   Accept: 100 connections are made and accepted. Deferred: the ring belongs to one thread, which
   runs what is due when it waits (SINGLE_ISSUER, DEFER_TASKRUN); else COOP_TASKRUN.            */
#include "uring.h"

#if VKP_BENCH_URING
#define SOCKETS 100
#define REPEATS 50

static const char *const transports[2] = {"unix", "tcp"};
static const char message[64] = "x";
static int senders[SOCKETS];
static int receivers[SOCKETS];
static int epoll_fd;
static uring ring; /* of the row that runs */

typedef enum kind {
    SENDMSG,
    SEND,
    RING_SEND,
    RING_SEND_FILES,
    EPOLL_RECEIVE,
    MULTISHOT_RECEIVE,
    MULTISHOT_RECEIVE_DEFERRED,
    EPOLL_ACCEPT,
    MULTISHOT_ACCEPT,
    MULTISHOT_ACCEPT_DEFERRED,
    KINDS
} kind;

static const char *const names[KINDS] = {"sendmsg",
                                         "send",
                                         "ring",
                                         "ring, registered files, deferred",
                                         "epoll_wait, recv",
                                         "multishot",
                                         "multishot, deferred",
                                         "epoll_wait, accept4",
                                         "multishot",
                                         "multishot, deferred"};

static void make_room(unsigned flags)
{
    if (!uring_open(&ring, flags)) {
        bench_fail("io_uring: %s", strerror(errno));
    }
}

static void take_off_the_clock(void)
{
    char in[256];
    int i;
    for (i = 0; i < SOCKETS; i++) {
        if (read(receivers[i], in, sizeof in) != (ssize_t)sizeof message) {
            bench_fail("a message is missing");
        }
    }
}

static void send_all(kind how)
{
    int i;
    for (i = 0; i < SOCKETS && how == SENDMSG; i++) {
        struct iovec range = {(void *)(uintptr_t)message, sizeof message};
        struct msghdr head;
        memset(&head, 0, sizeof head);
        head.msg_iov = &range;
        head.msg_iovlen = 1;
        (void)!sendmsg(senders[i], &head, MSG_NOSIGNAL);
    }
    for (i = 0; i < SOCKETS && how != SENDMSG; i++) {
        if (how == RING_SEND || how == RING_SEND_FILES) {
            uring_send(&ring, senders[i], message, sizeof message, 0);
        } else {
            (void)!send(senders[i], message, sizeof message, MSG_NOSIGNAL);
        }
    }
    if (how == RING_SEND || how == RING_SEND_FILES) {
        const struct io_uring_cqe *cqe;
        uring_submit(&ring, SOCKETS);
        while ((cqe = uring_peek(&ring)) != NULL) {
            if (cqe->res != (int)sizeof message) {
                bench_fail("io_uring: a send gave %d", cqe->res);
            }
            uring_took(&ring);
        }
    }
}

static void arm_receive(int i)
{
    struct io_uring_sqe *sqe = uring_next(&ring, IORING_OP_RECV, receivers[i], (uint64_t)i);
    sqe->ioprio = IORING_RECV_MULTISHOT;
    sqe->flags |= IOSQE_BUFFER_SELECT;
    sqe->buf_group = 1;
}

static void receive_by_ring(void)
{
    char in[256];
    int got = 0;
    while (got < SOCKETS) {
        const struct io_uring_cqe *cqe;
        uring_submit(&ring, 1);
        while ((cqe = uring_peek(&ring)) != NULL) {
            unsigned id = cqe->flags >> IORING_CQE_BUFFER_SHIFT;
            if (cqe->res != (int)sizeof message) {
                bench_fail("io_uring: a receive gave %d", cqe->res);
            }
            memcpy(in, ring.buffers + id * URING_BUFFER_BYTES, sizeof message);
            uring_give_buffer(&ring, id);
            if ((cqe->flags & IORING_CQE_F_MORE) == 0) {
                arm_receive((int)cqe->user_data);
            }
            uring_took(&ring);
            got++;
        }
    }
}

static void receive_by_epoll(void)
{
    struct epoll_event events[SOCKETS];
    char in[256];
    int got = 0;
    while (got < SOCKETS) {
        int count = epoll_wait(epoll_fd, events, SOCKETS, -1);
        int i;
        for (i = 0; i < count; i++) {
            got += recv(events[i].data.fd, in, sizeof in, 0) == (ssize_t)sizeof message;
        }
    }
}

static void open_sockets(const char *address)
{
    bench_address where = bench_address_of(address);
    int listener = bench_listen(address);
    int i;
    for (i = 0; i < SOCKETS; i++) {
        senders[i] = socket(where.u.any.sa_family, SOCK_STREAM, 0);
        if (connect(senders[i], &where.u.any, where.bytes) != 0) {
            bench_fail("connect: %s", strerror(errno));
        }
        bench_nodelay(senders[i]);
        receivers[i] = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
    }
    close(listener);
}

static void close_sockets(void)
{
    const struct linger none = {1, 0}; /* so that no port is kept */
    int i;
    for (i = 0; i < SOCKETS; i++) {
        (void)setsockopt(senders[i], SOL_SOCKET, SO_LINGER, &none, sizeof none);
        close(senders[i]);
        close(receivers[i]);
    }
}

/* The sockets and whatever the row waits with. */
static void prepare(kind how, const char *address)
{
    bool deferred = how == RING_SEND_FILES || how == MULTISHOT_RECEIVE_DEFERRED;
    int i;
    open_sockets(address);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (how == RING_SEND || deferred || how == MULTISHOT_RECEIVE) {
        make_room(deferred ? IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN
                           : IORING_SETUP_COOP_TASKRUN);
    }
    if (how == RING_SEND_FILES) {
        uring_open_files(&ring);
    } else if (how == MULTISHOT_RECEIVE || how == MULTISHOT_RECEIVE_DEFERRED) {
        uring_open_buffers(&ring);
    }
    for (i = 0; i < SOCKETS; i++) {
        struct epoll_event event = {EPOLLIN, {.fd = receivers[i]}};
        if (how == EPOLL_RECEIVE) {
            epoll_ctl(epoll_fd, EPOLL_CTL_ADD, receivers[i], &event);
        } else if (how == MULTISHOT_RECEIVE || how == MULTISHOT_RECEIVE_DEFERRED) {
            arm_receive(i);
        } else if (how == RING_SEND_FILES) {
            uring_set_file(&ring, senders[i], true);
        }
    }
}

static double transfer(kind how)
{
    double best = INFINITY;
    int i;
    for (i = 0; i < REPEATS; i++) {
        uint64_t begun = bench_now_ns();
        double spent;
        send_all(how > RING_SEND_FILES ? SEND : how);
        if (how == EPOLL_RECEIVE) {
            receive_by_epoll();
        } else if (how > EPOLL_RECEIVE) {
            receive_by_ring();
        }
        spent = (double)(bench_now_ns() - begun);
        best = spent < best ? spent : best;
        if (how <= RING_SEND_FILES) {
            take_off_the_clock();
        }
    }
    return best / SOCKETS;
}

static void accept_all(kind how, int listener)
{
    int got = 0;
    while (got < SOCKETS) {
        const struct io_uring_cqe *cqe;
        struct epoll_event event;
        int fd;
        if (how == EPOLL_ACCEPT) {
            (void)epoll_wait(epoll_fd, &event, 1, -1);
            while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
                receivers[got++] = fd;
            }
            continue;
        }
        uring_submit(&ring, 1);
        while ((cqe = uring_peek(&ring)) != NULL) {
            if (cqe->res < 0 || (cqe->flags & IORING_CQE_F_MORE) == 0) {
                bench_fail("io_uring: an accept gave %d", cqe->res);
            }
            receivers[got++] = cqe->res;
            uring_took(&ring);
        }
    }
}

static double make_connections(kind how, const char *address)
{
    bench_address where = bench_address_of(address);
    int listener = bench_listen(address);
    struct epoll_event event = {EPOLLIN, {.fd = listener}};
    double best = INFINITY;
    int i;
    int j;
    fcntl(listener, F_SETFL, O_NONBLOCK);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (how == EPOLL_ACCEPT) {
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event);
    } else {
        struct io_uring_sqe *sqe;
        make_room(how == MULTISHOT_ACCEPT
                      ? IORING_SETUP_COOP_TASKRUN
                      : IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN);
        sqe = uring_next(&ring, IORING_OP_ACCEPT, listener, 0);
        sqe->ioprio = IORING_ACCEPT_MULTISHOT;
        sqe->accept_flags = SOCK_NONBLOCK | SOCK_CLOEXEC;
        uring_submit(&ring, 0);
    }
    for (i = 0; i < REPEATS; i++) {
        uint64_t begun = bench_now_ns();
        double spent;
        for (j = 0; j < SOCKETS; j++) {
            senders[j] = socket(where.u.any.sa_family, SOCK_STREAM, 0);
            if (connect(senders[j], &where.u.any, where.bytes) != 0) {
                bench_fail("connect: %s", strerror(errno));
            }
        }
        accept_all(how, listener);
        spent = (double)(bench_now_ns() - begun);
        best = spent < best ? spent : best;
        close_sockets();
    }
    close(listener);
    return best / SOCKETS;
}

/* Each sample in a process of its own: what the kernel keeps for a ring goes with it. */
static void run(bench_row *row, double *values)
{
    static long ports;
    kind how = (kind)row->a;
    char address[96];
    int fds[2];
    pid_t child;
    if (row->b == 0) {
        snprintf(address, sizeof address, "unix:/tmp/vkp-bench-%ld", (long)getpid());
    } else { /* a new port each time: a ring's listener may outlive its process for a moment */
        snprintf(address, sizeof address, "tcp:127.0.0.1:%ld",
                 20000 + ((long)getpid() * 7 + ports++) % 10000);
    }
    if (pipe(fds) != 0) {
        bench_fail("pipe: %s", strerror(errno));
    }
    fflush(stdout);
    child = fork();
    if (child == 0) {
        double value;
        bench_pin(0);
        if (how < EPOLL_ACCEPT) {
            prepare(how, address);
            value = transfer(how);
            close_sockets();
        } else {
            value = make_connections(how, address);
        }
        _exit(write(fds[1], &value, sizeof value) == (ssize_t)sizeof value ? 0 : 1);
    }
    close(fds[1]);
    if (child < 0 || read(fds[0], values, sizeof *values) != (ssize_t)sizeof *values) {
        bench_fail("%s: no result", row->name);
    }
    close(fds[0]);
    waitpid(child, NULL, 0);
    if (row->b == 0) {
        unlink(address + 5);
    }
}

int main(int argc, char **argv)
{
    static const char *const parts[3] = {"send", "send, receive", "connect, accept"};
    static bench_row rows[2 * KINDS];
    static char groups[2 * KINDS][48];
    bench_table table = {"uring: ns for each operation, the least of 50 times 100",
                         {"ns/operation"},
                         {0},
                         1,
                         true,
                         rows,
                         0};
    size_t rounds = bench_rounds(argc, argv);
    int transport;
    int how;
    if (!uring_open(&ring, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN)) {
        printf("uring: %s\n", strerror(errno));
        return 0;
    }
    close(ring.fd);
    bench_print_machine();
    for (transport = 0; transport < 2; transport++) {
        for (how = 0; how < KINDS; how++) {
            int part = how < EPOLL_RECEIVE ? 0 : how < EPOLL_ACCEPT ? 1 : 2;
            bool own = how == SEND || how == EPOLL_RECEIVE || how == EPOLL_ACCEPT;
            bench_row row = {groups[table.count],
                             names[how],
                             own ? BENCH_PEER : BENCH_OTHER,
                             run,
                             how,
                             transport,
                             NULL,
                             {{NULL, 0}},
                             NULL};
            snprintf(groups[table.count], sizeof groups[0], "%s: %s", transports[transport],
                     parts[part]);
            rows[table.count++] = row;
        }
    }
    bench_keep(&table, argc, argv);
    bench_run(&table, rounds);
    return 0;
}
#else
int main(void)
{
    puts("uring: not here");
    return 0;
}
#endif
