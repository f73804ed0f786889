/* kqueue(2) over epoll(7); see kqueue_emulation.h.
   SPDX-License-Identifier: MIT

   The queue's descriptor is an epoll set, so that it can be polled and waited for. A registration
   is a note; the notes of a descriptor share its place in the set. A call looks at all that is
   ready, puts the notes that are and do not stand there yet at the end of a list, and gives from
   the front of the list what is ready still. What the set cannot tell of (EVFILT_USER, regular
   files) makes it readable through a bell, an eventfd in it.
   One lock for all queues, held with signals blocked: a handler never meets it locked by its own
   thread.                                                                                      */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1
#endif
#include "kqueue_emulation.h"

#include "internal.h"

#ifndef __linux__
const vkp_sys *vkp_test_sys(void)
{
    return vkp_sys_get_default();
}
#else
#include "kqueue/sys/event.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

/* The programs are linked with --wrap for these: how a close is seen. */
int __real_close(int fd);
int __real_dup2(int from, int to);
int __wrap_close(int fd);
int __wrap_dup2(int from, int to);

typedef struct note {
    struct note *prev; /* in the list of what may be ready */
    struct note *next;
    struct kevent event; /* as registered */
    bool there;
    bool listed;
    bool disabled;
    bool triggered;       /* EVFILT_USER */
    uint64_t ready_look;  /* the last look that found it ready */
    uint64_t active_look; /* and, with EV_CLEAR, newly so */
    struct kevent found;  /* what that look found: EV_EOF, fflags, data */
    struct kevent told;   /* what was reported last, for EV_CLEAR */
    bool was_told;
} note;

typedef struct place { /* of a descriptor */
    note reads;
    note writes;
    mode_t kind; /* S_IFREG and so on */
    bool in_epoll;
} place;

typedef struct user {
    struct user *next;
    note note;
} user;

typedef struct queue {
    struct queue *next;
    int fd;
    int bell;
    place **places; /* by descriptor */
    size_t place_count;
    size_t note_count; /* of descriptors */
    size_t file_count; /* of those, regular files */
    user *users;
    note list; /* ring */
    uint64_t look;
    struct epoll_event *ready;
    size_t ready_capacity;
} queue;

static queue *queues;
static uint32_t queue_count; /* atomic: so that a close without any queue costs nothing */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static sigset_t signals_before; /* of who has the lock */

static void lock_queues(void)
{
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    pthread_mutex_lock(&lock);
    signals_before = before;
}

static void unlock_queues(void)
{
    sigset_t before = signals_before;
    pthread_mutex_unlock(&lock);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void *grow(void *block, size_t count, size_t wanted, size_t each)
{
    char *grown = realloc(block, wanted * each);
    if (grown == NULL) {
        vkp_test_fail("no memory for an emulated kqueue");
    }
    memset(grown + count * each, 0, (wanted - count) * each);
    return grown;
}

static queue *find_queue(int fd)
{
    queue *self = queues;
    while (self != NULL && self->fd != fd) {
        self = self->next;
    }
    return self;
}

/* ---- the list of what may be ready ---- */

static void append(queue *self, note *each)
{
    if (!each->listed) {
        each->listed = true;
        each->prev = self->list.prev;
        each->next = &self->list;
        self->list.prev->next = each;
        self->list.prev = each;
    }
}

static void take_out(note *each)
{
    if (each->listed) {
        each->listed = false;
        each->prev->next = each->next;
        each->next->prev = each->prev;
    }
}

/* ---- registrations of descriptors ---- */

static place *find_place(const queue *self, uintptr_t fd)
{
    return fd < self->place_count ? self->places[fd] : NULL;
}

static place *make_place(queue *self, int fd)
{
    if ((size_t)fd >= self->place_count) {
        self->places = grow(self->places, self->place_count, (size_t)fd * 2 + 16, sizeof(place *));
        self->place_count = (size_t)fd * 2 + 16;
    }
    if (self->places[fd] == NULL) {
        self->places[fd] = grow(NULL, 0, 1, sizeof(place));
    }
    return self->places[fd];
}

/* What the set is to watch for the notes of this descriptor; 0 or a negated errno. */
static int set_epoll(queue *self, int fd, place *where)
{
    struct epoll_event event;
    const bool reads = where->reads.there && !where->reads.disabled;
    const bool writes = where->writes.there && !where->writes.disabled;
    int operation = EPOLL_CTL_DEL;
    if (S_ISREG(where->kind) || (!reads && !writes && !where->in_epoll)) {
        return 0;
    }
    if (reads || writes) {
        operation = where->in_epoll ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    }
    memset(&event, 0, sizeof event);
    event.events = (reads ? EPOLLIN | EPOLLRDHUP : 0u) | (writes ? EPOLLOUT : 0u);
    event.data.fd = fd;
    if (epoll_ctl(self->fd, operation, fd, &event) != 0) {
        return errno == EPERM ? -EINVAL : -errno;
    }
    where->in_epoll = operation != EPOLL_CTL_DEL;
    return 0;
}

static void remove_note(queue *self, int fd, place *where, note *each)
{
    if (each->there) {
        take_out(each);
        memset(each, 0, sizeof *each);
        self->note_count--;
        self->file_count -= S_ISREG(where->kind) ? 1 : 0;
        set_epoll(self, fd, where);
    }
}

static int refuse(mode_t kind, int fd, short filter)
{
    struct pollfd entry;
    entry.fd = fd;
    entry.events = POLLOUT;
    entry.revents = 0;
    if (filter == EVFILT_WRITE && S_ISREG(kind)) {
        return -EINVAL;
    }
    if (filter == EVFILT_WRITE && S_ISFIFO(kind) && poll(&entry, 1, 0) == 1 &&
        (entry.revents & POLLERR) != 0) {
        return -EPIPE;
    }
    return 0;
}

static int add_note(queue *self, int fd, note *each, place *where, const struct kevent *change)
{
    int error;
    if (!each->there) {
        struct stat found;
        if (fstat(fd, &found) != 0) {
            return -errno;
        }
        where->kind = found.st_mode & S_IFMT;
        error = refuse(where->kind, fd, change->filter);
        if (error != 0) {
            return error;
        }
        each->there = true;
        self->note_count++;
        self->file_count += S_ISREG(where->kind) ? 1 : 0;
    }
    each->event = *change;
    each->disabled = (change->flags & EV_DISABLE) != 0;
    error = set_epoll(self, fd, where);
    if (error != 0) {
        remove_note(self, fd, where, each);
    }
    return error;
}

static int change_descriptor(queue *self, const struct kevent *change)
{
    const int fd = (int)change->ident;
    place *where;
    note *each;
    if (change->ident > INT_MAX || fcntl(fd, F_GETFD) < 0) {
        return -EBADF;
    }
    where = make_place(self, fd);
    each = change->filter == EVFILT_READ ? &where->reads : &where->writes;
    if ((change->flags & EV_ADD) != 0) {
        return add_note(self, fd, each, where, change);
    }
    if (!each->there) {
        return -ENOENT;
    }
    if ((change->flags & EV_DELETE) != 0) {
        remove_note(self, fd, where, each);
    } else if ((change->flags & (EV_ENABLE | EV_DISABLE)) != 0) {
        each->disabled = (change->flags & EV_DISABLE) != 0;
        return set_epoll(self, fd, where);
    }
    return 0;
}

/* ---- registrations of the program's own events ---- */

static void ring(const queue *self)
{
    const uint64_t one = 1;
    (void)!write(self->bell, &one, sizeof one);
}

static void remove_user(user **at)
{
    user *gone = *at;
    take_out(&gone->note);
    *at = gone->next;
    free(gone);
}

/* A trigger allocates nothing: it may come from a signal handler. */
static int change_user(queue *self, const struct kevent *change)
{
    user **at = &self->users;
    while (*at != NULL && (*at)->note.event.ident != change->ident) {
        at = &(*at)->next;
    }
    if (*at == NULL) {
        if ((change->flags & EV_ADD) == 0) {
            return -ENOENT;
        }
        *at = grow(NULL, 0, 1, sizeof(user));
        (*at)->note.there = true;
    }
    if ((change->flags & EV_DELETE) != 0) {
        remove_user(at);
        return 0;
    }
    if ((change->flags & EV_ADD) != 0) {
        (*at)->note.event = *change;
    }
    if ((change->flags & (EV_ADD | EV_ENABLE | EV_DISABLE)) != 0) {
        (*at)->note.disabled = (change->flags & EV_DISABLE) != 0;
    }
    if ((change->fflags & NOTE_TRIGGER) != 0) {
        (*at)->note.triggered = true;
    }
    if ((*at)->note.triggered) {
        ring(self);
    }
    return 0;
}

static int apply(queue *self, const struct kevent *change)
{
    switch (change->filter) {
    case EVFILT_READ:
    case EVFILT_WRITE:
        return change_descriptor(self, change);
    case EVFILT_USER:
        return change_user(self, change);
    default:
        return -EINVAL;
    }
}

/* ---- a look at what is ready ---- */

/* Is this news to an EV_CLEAR note? It went away in between, there is more of it, or the end. */
static bool is_news(const queue *self, const note *each)
{
    return !each->was_told || each->ready_look + 1 != self->look ||
           each->found.data > each->told.data ||
           ((each->found.flags & EV_EOF) != 0 && (each->told.flags & EV_EOF) == 0);
}

static void find_ready(queue *self, note *each, unsigned short flags, unsigned fflags,
                       intptr_t data)
{
    each->found.flags = flags;
    each->found.fflags = fflags;
    each->found.data = data;
    if ((each->event.flags & EV_CLEAR) == 0 || is_news(self, each)) {
        each->active_look = self->look;
        append(self, each);
    }
    each->ready_look = self->look;
}

static void look_at_reads(queue *self, const struct epoll_event *event)
{
    place *where = find_place(self, (uintptr_t)event->data.fd);
    const uint32_t end = where != NULL && S_ISSOCK(where->kind) ? EPOLLRDHUP | EPOLLHUP : EPOLLHUP;
    const bool ends = (event->events & end) != 0;
    int bytes = 0;
    if (where == NULL || !where->reads.there || where->reads.disabled ||
        (event->events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) == 0) {
        return;
    }
    if (ioctl(event->data.fd, FIONREAD, &bytes) != 0) {
        bytes = 1; /* a listening socket: connections. Others do not say how much. */
    }
    find_ready(self, &where->reads, ends ? EV_EOF : 0,
               ends && (event->events & EPOLLERR) != 0 ? ECONNRESET : 0, bytes);
}

static void look_at_writes(queue *self, const struct epoll_event *event)
{
    place *where = find_place(self, (uintptr_t)event->data.fd);
    bool is_socket;
    bool ends;
    if (where == NULL || !where->writes.there || where->writes.disabled ||
        (event->events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) == 0) {
        return;
    }
    is_socket = S_ISSOCK(where->kind);
    ends = (event->events & (is_socket ? EPOLLHUP : EPOLLHUP | EPOLLERR)) != 0;
    find_ready(self, &where->writes, ends ? EV_EOF : 0,
               ends && is_socket && (event->events & EPOLLERR) != 0 ? ECONNRESET : 0,
               (event->events & EPOLLOUT) != 0 ? PIPE_BUF : 0);
}

static void look_at_files(queue *self)
{
    size_t fd;
    for (fd = 0; self->file_count > 0 && fd < self->place_count; fd++) {
        place *where = self->places[fd];
        struct stat found;
        off_t left;
        if (where == NULL || !S_ISREG(where->kind) || !where->reads.there ||
            where->reads.disabled || fstat((int)fd, &found) != 0) {
            continue;
        }
        left = found.st_size - lseek((int)fd, 0, SEEK_CUR);
        if (left != 0) {
            find_ready(self, &where->reads, 0, 0, (intptr_t)left);
        }
    }
}

static void look(queue *self)
{
    size_t wanted = self->note_count + 1;
    user *each;
    int count;
    int i;
    if (wanted > self->ready_capacity) {
        self->ready = grow(self->ready, self->ready_capacity, wanted * 2, sizeof *self->ready);
        self->ready_capacity = wanted * 2;
    }
    self->look++;
    count = epoll_wait(self->fd, self->ready, (int)wanted, 0);
    for (i = 0; i < count; i++) {
        look_at_reads(self, &self->ready[i]);
    }
    for (i = 0; i < count; i++) {
        look_at_writes(self, &self->ready[i]);
    }
    look_at_files(self);
    for (each = self->users; each != NULL; each = each->next) {
        if (each->note.triggered && !each->note.disabled) {
            each->note.was_told = false;
            find_ready(self, &each->note, 0, 0, 0);
        }
    }
}

static bool any_triggered(const queue *self)
{
    const user *each = self->users;
    while (each != NULL && !each->note.triggered) {
        each = each->next;
    }
    return each != NULL;
}

/* After a note was reported. */
static void reported(queue *self, note *each)
{
    each->told = each->found;
    each->was_told = true;
    if ((each->event.flags & EV_ONESHOT) != 0) {
        struct kevent change = each->event;
        change.flags = EV_DELETE;
        change.fflags = 0;
        apply(self, &change);
    } else if ((each->event.flags & EV_CLEAR) != 0) {
        each->triggered = false;
    } else {
        append(self, each);
    }
}

static int give(queue *self, struct kevent *out, int capacity)
{
    note *const last = self->list.prev;
    note *each = self->list.next;
    int count = 0;
    uint64_t rung;
    bool done = last == &self->list || capacity == 0;
    while (!done && count < capacity) {
        note *const next = each->next;
        done = each == last;
        take_out(each);
        if (each->active_look == self->look) {
            out[count] = each->event;
            out[count].flags = (unsigned short)(each->event.flags & (EV_ONESHOT | EV_CLEAR));
            out[count].flags = (unsigned short)(out[count].flags | each->found.flags);
            out[count].fflags = each->found.fflags;
            out[count].data = each->found.data;
            count++;
            reported(self, each);
        }
        each = next;
    }
    if (!any_triggered(self)) {
        (void)!read(self->bell, &rung, sizeof rung);
    }
    return count;
}

/* ---- the calls ---- */

/* Apply the changes; how many took a place among the events, or a negated errno. */
static int apply_all(queue *self, const struct kevent *changes, int change_count,
                     struct kevent *out, int capacity, bool *stopped)
{
    int places = 0;
    int i;
    *stopped = false;
    for (i = 0; i < change_count && !*stopped; i++) {
        const int error = apply(self, &changes[i]);
        if (error == 0 && (changes[i].flags & EV_RECEIPT) == 0) {
            continue;
        }
        if (places == capacity) {
            *stopped = true;
            return error;
        }
        out[places] = changes[i];
        out[places].flags = EV_ERROR;
        out[places++].data = -error;
    }
    return places;
}

static int call(int kq, const struct kevent *changes, int change_count, struct kevent *events,
                int event_count, uint64_t deadline_ns)
{
    struct epoll_event any;
    bool stopped;
    bool late = deadline_ns == 0;
    queue *self = find_queue(kq);
    int result = self == NULL
                     ? -EBADF
                     : apply_all(self, changes, change_count, events, event_count, &stopped);
    if (result != 0 || stopped || event_count == 0) {
        return result;
    }
    for (;;) {
        look(self);
        result = give(self, events, event_count);
        if (result > 0 || late) {
            return result;
        }
        unlock_queues();
        result = vkp_sys_get_default()->epoll_wait(kq, &any, 1, deadline_ns);
        sched_yield(); /* what EV_CLEAR keeps silent about keeps the set readable */
        lock_queues();
        self = find_queue(kq);
        if (result < 0 || self == NULL) {
            return self == NULL ? -EBADF : result;
        }
        late = result == 0;
    }
}

int vkp_test_kevent(int kq, const void *changes, int change_count, void *events, int event_count,
                    uint64_t deadline_ns)
{
    const int before = errno;
    int result;
    lock_queues();
    result = call(kq, (const struct kevent *)changes, change_count, (struct kevent *)events,
                  event_count, deadline_ns);
    unlock_queues();
    errno = before;
    return result;
}

/* ---- queues come and go ---- */

static void free_queue(queue **at)
{
    queue *self = *at;
    size_t fd;
    *at = self->next;
    __atomic_fetch_sub(&queue_count, 1, __ATOMIC_SEQ_CST);
    for (fd = 0; fd < self->place_count; fd++) {
        free(self->places[fd]);
    }
    while (self->users != NULL) {
        remove_user(&self->users);
    }
    __real_close(self->bell);
    free(self->places);
    free(self->ready);
    free(self);
}

/* The descriptor is about to be closed: a queue ends, in the others its notes do. */
static void forget(int fd)
{
    queue **at = &queues;
    while (*at != NULL) {
        queue *self = *at;
        place *where = fd < 0 ? NULL : find_place(self, (uintptr_t)fd);
        if (self->fd == fd) {
            free_queue(at);
            continue;
        }
        if (where != NULL) {
            remove_note(self, fd, where, &where->reads);
            remove_note(self, fd, where, &where->writes);
        }
        at = &self->next;
    }
}

static void forget_locked(int fd)
{
    if (__atomic_load_n(&queue_count, __ATOMIC_SEQ_CST) > 0) {
        const int before = errno;
        lock_queues();
        forget(fd);
        unlock_queues();
        errno = before;
    }
}

int __wrap_close(int fd)
{
    forget_locked(fd);
    return __real_close(fd);
}

int __wrap_dup2(int from, int to)
{
    if (from != to && fcntl(from, F_GETFD) >= 0) {
        forget_locked(to);
    }
    return __real_dup2(from, to);
}

static void forked(void)
{
    while (queues != NULL) {
        __real_close(queues->fd);
        free_queue(&queues);
    }
    unlock_queues();
}

static void watch_forks(void)
{
    if (pthread_atfork(lock_queues, unlock_queues, forked) != 0) {
        vkp_test_fail("no memory for an emulated kqueue");
    }
}

int vkp_test_kqueue_create(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    const int before = errno;
    struct epoll_event event;
    queue *self;
    int result = epoll_create1(EPOLL_CLOEXEC);
    const int bell = result < 0 ? -1 : eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    pthread_once(&once, watch_forks);
    if (bell < 0) {
        const int error = errno;
        if (result >= 0) {
            __real_close(result);
        }
        errno = before;
        return -error;
    }
    self = grow(NULL, 0, 1, sizeof *self);
    self->fd = result;
    self->bell = bell;
    self->list.prev = self->list.next = &self->list;
    memset(&event, 0, sizeof event);
    event.events = EPOLLIN;
    event.data.fd = bell;
    epoll_ctl(self->fd, EPOLL_CTL_ADD, bell, &event);
    lock_queues();
    self->next = queues;
    queues = self;
    __atomic_fetch_add(&queue_count, 1, __ATOMIC_SEQ_CST);
    unlock_queues();
    errno = before;
    return result;
}

static vkp_sys table;

static void fill_table(void)
{
    table = *vkp_sys_get_default();
    table.kqueue_create = vkp_test_kqueue_create;
    table.kevent = vkp_test_kevent;
}

const vkp_sys *vkp_test_sys(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, fill_table);
    return &table;
}
#endif /* __linux__ */
