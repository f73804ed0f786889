/* A blocking peer over a raw descriptor, with a RESP scanner of its own: it must not share the
   library's mistakes. See support.h.
   SPDX-License-Identifier: MIT */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1
#elif defined(__APPLE__) && !defined(_DARWIN_C_SOURCE)
#define _DARWIN_C_SOURCE 1
#endif
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#ifdef MSG_NOSIGNAL
#define SEND_FLAGS (MSG_NOSIGNAL | MSG_DONTWAIT)
#else
#define SEND_FLAGS MSG_DONTWAIT
#endif

/* Received bytes stand in data[start..end); a frame given out ends at `start`, where `under_end`
   keeps the byte that its terminator replaced.                                                  */
struct vkp_test_peer {
    int fd;
    bool ended;
    bool terminated;
    char under_end;
    char *data;
    size_t start;
    size_t end;
    size_t capacity;
    size_t scanned;   /* of the frame under way, from start */
    size_t remaining; /* values still to come in it; 0 = none begun */
};

/* --------------------------------------------------------------------------------------
   Connecting                                                                                */

/* Non-blocking until connected, so that a full backlog ends in a message and not in a hang. */
static int connect_to(int family, const void *address, size_t bytes)
{
    int fd = socket(family, SOCK_STREAM, 0);
    if (fd < 0) {
        vkp_test_fail("socket: %s", strerror(errno));
    }
    vkp_test_i_prepare_fd(fd);
    int flags = fcntl(fd, F_GETFL);
    fcntl(fd, F_SETFL, flags | O_NONBLOCK);
    uint64_t deadline = vkp_test_deadline();
    int error = 0;
    /* EAGAIN is Linux's word for a Unix socket whose backlog is full: it wants another try */
    while (connect(fd, (const struct sockaddr *)address, (socklen_t)bytes) != 0) {
        error = errno;
        if (error != EAGAIN) {
            break;
        }
        if (vkp_now_ns() > deadline) {
            vkp_test_fail("connect: the backlog stays full");
        }
        vkp_test_i_poll(-1, 0, vkp_now_ns() + 1000000);
        error = 0;
    }
    if (error == EINPROGRESS || error == EINTR) {
        socklen_t size = sizeof error;
        if (!vkp_test_i_poll(fd, POLLOUT, deadline)) {
            vkp_test_fail("connect: no answer");
        }
        getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
    }
    if (error && error != EISCONN) {
        close(fd);
        errno = error;
        return -1;
    }
    fcntl(fd, F_SETFL, flags);
    return fd;
}

static int connect_unix(const char *path)
{
    struct sockaddr_un address;
    memset(&address, 0, sizeof address);
    address.sun_family = AF_UNIX;
    if (strlen(path) >= sizeof address.sun_path) {
        vkp_test_fail("a socket path is too long: %s", path);
    }
    strcpy(address.sun_path, path);
    return connect_to(AF_UNIX, &address, sizeof address);
}

static int connect_tcp(const char *host_and_port)
{
    char host[256];
    const char *colon = strrchr(host_and_port, ':');
    if (!colon || (size_t)(colon - host_and_port) >= sizeof host) {
        vkp_test_fail("no HOST:PORT: %s", host_and_port);
    }
    size_t len = (size_t)(colon - host_and_port);
    bool bracketed = len >= 2 && host_and_port[0] == '[';
    snprintf(host, sizeof host, "%.*s", (int)(bracketed ? len - 2 : len),
             host_and_port + (bracketed ? 1 : 0));
    struct addrinfo hints;
    struct addrinfo *found = NULL;
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    if (getaddrinfo(host, colon + 1, &hints, &found) != 0) {
        vkp_test_fail("no such host: %s", host_and_port);
    }
    int fd = connect_to(found->ai_family, found->ai_addr, found->ai_addrlen);
    int error = errno;
    freeaddrinfo(found);
    errno = error;
    return fd;
}

int vkp_test_connect(const char *address)
{
    if (!strncmp(address, "unix:", 5)) {
        return connect_unix(address + 5);
    }
    if (!strncmp(address, "tcp:", 4)) {
        return connect_tcp(address + 4);
    }
    vkp_test_fail("no address: %s", address);
}

vkp_test_peer *vkp_test_peer_of(int fd)
{
    vkp_test_peer *peer = (vkp_test_peer *)vkp_test_i_alloc(NULL, sizeof *peer);
    memset(peer, 0, sizeof *peer);
    peer->fd = fd;
    return peer;
}

vkp_test_peer *vkp_test_peer_open(const char *address)
{
    int fd = vkp_test_connect(address);
    if (fd < 0) {
        vkp_test_fail("connect %s: %s", address, strerror(errno));
    }
    return vkp_test_peer_of(fd);
}

void vkp_test_peer_close(vkp_test_peer *peer)
{
    if (!peer) {
        return;
    }
    close(peer->fd);
    free(peer->data);
    free(peer);
}

int vkp_test_peer_fd(const vkp_test_peer *peer)
{
    return peer->fd;
}

bool vkp_test_peer_is_ended(const vkp_test_peer *peer)
{
    return peer->ended;
}

/* --------------------------------------------------------------------------------------
   Sending                                                                                   */

bool vkp_test_peer_send(vkp_test_peer *peer, const void *data, size_t len)
{
    const char *at = (const char *)data;
    uint64_t deadline = vkp_test_deadline();
    while (len > 0) {
        ssize_t sent = send(peer->fd, at, len, SEND_FLAGS);
        if (sent >= 0) {
            at += sent;
            len -= (size_t)sent;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS) {
            if (!vkp_test_i_poll(peer->fd, POLLOUT, deadline)) {
                vkp_test_fail("the other side does not read: %lu bytes are left",
                              (unsigned long)len);
            }
        } else if (errno != EINTR) {
            return false;
        }
    }
    return true;
}

bool vkp_test_peer_send_text(vkp_test_peer *peer, const char *text)
{
    return vkp_test_peer_send(peer, text, strlen(text));
}

bool vkp_test_peer_command(vkp_test_peer *peer, ...)
{
    size_t count = 0;
    size_t bytes = 32;
    va_list arguments;
    va_start(arguments, peer);
    const char *at;
    while ((at = va_arg(arguments, const char *))) {
        count++;
        bytes += strlen(at) + 32;
    }
    va_end(arguments);
    char *text = (char *)vkp_test_i_alloc(NULL, bytes);
    int len = snprintf(text, bytes, "*%lu\r\n", (unsigned long)count);
    va_start(arguments, peer);
    while ((at = va_arg(arguments, const char *))) {
        len += snprintf(text + len, bytes - (size_t)len, "$%lu\r\n%s\r\n",
                        (unsigned long)strlen(at), at);
    }
    va_end(arguments);
    bool sent = vkp_test_peer_send(peer, text, (size_t)len);
    free(text);
    return sent;
}

/* --------------------------------------------------------------------------------------
   Receiving                                                                                 */

/* Take back the last view, before anything is read or scanned again. */
static void take_back(vkp_test_peer *peer)
{
    if (peer->terminated) {
        peer->data[peer->start] = peer->under_end;
    }
    peer->terminated = false;
    if (peer->start == peer->end) {
        peer->start = peer->end = 0;
    }
}

/* One read into the buffer; false when it would block. */
static bool fill(vkp_test_peer *peer)
{
    if (peer->capacity - peer->end < 4097) {
        if (peer->start > 0) {
            memmove(peer->data, peer->data + peer->start, peer->end - peer->start);
        }
        peer->end -= peer->start;
        peer->start = 0;
        if (peer->capacity - peer->end < 4097) {
            peer->capacity = peer->capacity ? peer->capacity * 2 : 16384;
            peer->data = (char *)vkp_test_i_alloc(peer->data, peer->capacity);
        }
    }
    /* one byte stays free for a terminator */
    ssize_t got =
        recv(peer->fd, peer->data + peer->end, peer->capacity - peer->end - 1, MSG_DONTWAIT);
    if (got > 0) {
        peer->end += (size_t)got;
    }
    peer->data[peer->end] = '\0';
    if (got > 0) {
        return true;
    }
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
        return false;
    } else if (got == 0 || errno != EINTR) {
        peer->ended = true;
    }
    return true;
}

static void fill_waiting(vkp_test_peer *peer, uint64_t deadline)
{
    if (fill(peer)) {
        return;
    }
    if (!vkp_test_i_poll(peer->fd, POLLIN, deadline)) {
        vkp_test_fail("nothing to read for too long; %lu bytes of what was awaited came: %.200s",
                      (unsigned long)(peer->end - peer->start),
                      peer->end > peer->start ? peer->data + peer->start : "");
    }
}

static const char *give(vkp_test_peer *peer, size_t len)
{
    const char *view = peer->data + peer->start;
    peer->start += len;
    peer->under_end = peer->data[peer->start];
    peer->data[peer->start] = '\0';
    peer->terminated = true;
    return view;
}

const char *vkp_test_peer_read(vkp_test_peer *peer, size_t len)
{
    uint64_t deadline = vkp_test_deadline();
    if (peer->remaining) {
        vkp_test_fail("a read of bytes in the middle of a frame");
    }
    take_back(peer);
    while (peer->end - peer->start < len && !peer->ended) {
        fill_waiting(peer, deadline);
    }
    if (!peer->data) {
        fill(peer);
    }
    return peer->end - peer->start < len ? NULL : give(peer, len);
}

static void count_value(vkp_test_peer *peer, const char *line, size_t *skip)
{
    long number = strtol(line + 1, NULL, 10);
    size_t elements = number > 0 ? (size_t)number : 0;
    switch (line[0]) {
    case '+':
    case '-':
    case ':':
    case ',':
    case '#':
    case '(':
    case '_':
        peer->remaining--;
        break;
    case '$':
    case '=':
    case '!':
        peer->remaining--;
        *skip = number >= 0 ? (size_t)number + 2 : 0;
        break;
    case '*':
    case '~':
    case '>':
        peer->remaining += elements - 1;
        break;
    case '%':
        peer->remaining += 2 * elements - 1;
        break;
    case '|': /* the value that it annotates is still to come */
        peer->remaining += 2 * elements;
        break;
    default:
        vkp_test_fail("no RESP: %.200s", line);
    }
}

/* The length of the frame at the front, 0 while it is not whole. Goes on where it stopped, so that
   a big frame in small pieces stays linear.                                                     */
static size_t scan(vkp_test_peer *peer)
{
    size_t available = peer->end - peer->start;
    if (available == 0) {
        return 0;
    }
    const char *data = peer->data + peer->start;
    if (peer->remaining == 0) {
        peer->remaining = 1;
        peer->scanned = 0;
    }
    while (peer->remaining > 0) {
        const char *line = data + peer->scanned;
        const char *newline = peer->scanned < available
                                  ? (const char *)memchr(line, '\n', available - peer->scanned)
                                  : NULL;
        if (!newline) {
            return 0;
        }
        size_t remaining = peer->remaining;
        size_t skip = 0;
        size_t line_bytes = (size_t)(newline - line) + 1;
        count_value(peer, line, &skip);
        if (peer->scanned + line_bytes + skip > available) {
            peer->remaining = remaining;
            return 0;
        }
        peer->scanned += line_bytes + skip;
    }
    return peer->scanned;
}

static const char *give_frame(vkp_test_peer *peer, size_t bytes, size_t *len)
{
    *len = bytes;
    return give(peer, bytes);
}

const char *vkp_test_peer_read_frame(vkp_test_peer *peer, size_t *len)
{
    uint64_t deadline = vkp_test_deadline();
    take_back(peer);
    for (;;) {
        size_t bytes = scan(peer);
        if (bytes) {
            return give_frame(peer, bytes, len);
        }
        if (peer->ended) {
            return NULL;
        }
        fill_waiting(peer, deadline);
    }
}

const char *vkp_test_peer_try_read_frame(vkp_test_peer *peer, size_t *len)
{
    take_back(peer);
    for (;;) {
        size_t bytes = scan(peer);
        if (bytes) {
            return give_frame(peer, bytes, len);
        }
        if (peer->ended || !fill(peer)) {
            return NULL;
        }
    }
}

size_t vkp_test_peer_drain(vkp_test_peer *peer)
{
    uint64_t deadline = vkp_test_deadline();
    size_t dropped = 0;
    take_back(peer);
    for (;;) {
        dropped += peer->end - peer->start;
        peer->start = peer->end = 0;
        if (peer->ended) {
            break;
        }
        fill_waiting(peer, deadline);
    }
    peer->remaining = 0;
    return dropped;
}
