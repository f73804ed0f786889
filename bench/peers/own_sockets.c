/* Workers of our own making, without the library, for listening Unix sockets and their names.
   SPDX-License-Identifier: MIT

   Items as in socketed.h. Kinds of ref, upgrade, find and obtain, which need no real sockets:
       words      the limit: a count is added to and subtracted from, by weak handle and by name
                  only while it is not 0; names are in a table that is read without a lock
       mutex, rwlock
                  the same table behind a lock, which is held until the reference is taken
   Kinds of cycle, end and crowd:
       calls      the limit: socket, bind, listen; unlink, close
       calls-lock the same, with what tells a dead process's file from a live one's: a lock file,
                  and lstat before anything is unlinked                                         */
#include "socketed.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/un.h>

/* ---- references ---- */

#define BUCKETS 2048

/* A line each. */
typedef struct counted {
    uint32_t references __attribute__((aligned(64)));
} counted;

typedef struct bucket {
    uint64_t hash; /* 0: empty */
    const char *name;
    counted *object;
} bucket;

static counted objects[SOCKETED_MOST];
static counted *handles[SOCKETED_MOST];
static bucket table[BUCKETS];
static pthread_mutex_t table_mutex WORK_ALIGNED = PTHREAD_MUTEX_INITIALIZER;
static pthread_rwlock_t table_rwlock WORK_ALIGNED = PTHREAD_RWLOCK_INITIALIZER;

WORK_INLINE uint64_t stir(uint64_t hash, uint64_t word)
{
    hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
    return hash ^ hash >> 32;
}

/* Eight bytes at a time; the last ones may be taken twice. */
WORK_INLINE uint64_t hash_of(const char *name, size_t len)
{
    uint64_t hash = len;
    uint64_t word = 0;
    size_t i;
    for (i = 0; i + 8 < len; i += 8) {
        memcpy(&word, name + i, 8);
        hash = stir(hash, word);
    }
    if (len >= 8) {
        memcpy(&word, name + len - 8, 8);
    } else {
        memcpy(&word, name, len);
    }
    return stir(hash, word) | 1;
}

/* By a terminated name, as ours are asked. */
WORK_INLINE counted *look_up(const char *name)
{
    size_t len = strlen(name);
    uint64_t hash = hash_of(name, len);
    size_t at = hash % BUCKETS;
    while (table[at].hash != 0) {
        if (table[at].hash == hash && memcmp(table[at].name, name, len + 1) == 0) {
            return __atomic_load_n(&table[at].object, __ATOMIC_ACQUIRE);
        }
        at = (at + 1) % BUCKETS;
    }
    return NULL;
}

WORK_INLINE bool upgrade(counted *object)
{
    uint32_t seen = __atomic_load_n(&object->references, __ATOMIC_RELAXED);
    do {
        if (seen == 0) {
            return false;
        }
    } while (!__atomic_compare_exchange_n(&object->references, &seen, seen + 1, true,
                                          __ATOMIC_ACQUIRE, __ATOMIC_RELAXED));
    return true;
}

WORK_INLINE void give_back(counted *object)
{
    if (__atomic_fetch_sub(&object->references, 1, __ATOMIC_RELEASE) == 1) {
        work_fail("a last reference where none should be");
    }
}

WORK_INLINE void need(bool upgraded)
{
    if (!upgraded) {
        work_fail("not found");
    }
}

WORK_INLINE void add_once(uint32_t which)
{
    counted *object = handles[which];
    __atomic_fetch_add(&object->references, 1, __ATOMIC_RELAXED);
    give_back(object);
}
SOCKETED_TURNS(add)

WORK_INLINE void upgrade_once(uint32_t which)
{
    counted *object = handles[which];
    need(upgrade(object));
    give_back(object);
}
SOCKETED_TURNS(upgrade)

WORK_INLINE void free_once(uint32_t which)
{
    counted *object = look_up(socketed_names[which]);
    need(object != NULL && upgrade(object));
    give_back(object);
}
SOCKETED_TURNS(free)

WORK_INLINE void mutex_once(uint32_t which)
{
    counted *object;
    pthread_mutex_lock(&table_mutex);
    object = look_up(socketed_names[which]);
    need(object != NULL && upgrade(object));
    pthread_mutex_unlock(&table_mutex);
    give_back(object);
}
SOCKETED_TURNS(mutex)

WORK_INLINE void rwlock_once(uint32_t which)
{
    counted *object;
    pthread_rwlock_rdlock(&table_rwlock);
    object = look_up(socketed_names[which]);
    need(object != NULL && upgrade(object));
    pthread_rwlock_unlock(&table_rwlock);
    give_back(object);
}
SOCKETED_TURNS(rwlock)

static void fill_table(const work_order *order)
{
    long i;
    for (i = 0; i < order->a; i++) {
        uint64_t hash = hash_of(socketed_names[i], strlen(socketed_names[i]));
        size_t at = hash % BUCKETS;
        while (table[at].hash != 0) {
            at = (at + 1) % BUCKETS;
        }
        objects[i].references = 1;
        handles[i] = &objects[i];
        table[at].hash = hash;
        table[at].name = socketed_names[i];
        table[at].object = &objects[i];
    }
}

static work_figures references(const work_order *order)
{
    void *(*entry)(void *) = free_turns;
    work_figures figures;
    socketed_enter();
    fill_table(order);
    if (strcmp(order->kind, "mutex") == 0) {
        entry = mutex_turns;
    } else if (strcmp(order->kind, "rwlock") == 0) {
        entry = rwlock_turns;
    } else if (strcmp(order->item, "ref") == 0) {
        entry = add_turns;
    } else if (strcmp(order->item, "upgrade") == 0) {
        entry = upgrade_turns;
    }
    figures = socketed_run(order, entry);
    socketed_leave();
    return figures;
}

/* ---- lives ---- */

typedef struct raw_socket {
    const char *name; /* the caller's */
    char lock[40];
    struct stat file;
    int fd;
    int lock_fd; /* -1: none */
} raw_socket;

static void check(bool is_good, const char *what)
{
    if (!is_good) {
        fprintf(stderr, "%s: %s\n", what, strerror(errno));
        work_fail("calls");
    }
}

static void listen_at(raw_socket *self, const char *name)
{
    struct sockaddr_un address;
    memset(&address, 0, sizeof address);
    address.sun_family = AF_UNIX;
    snprintf(address.sun_path, sizeof address.sun_path, "%s", name);
    self->name = name;
    self->fd = socket(AF_UNIX, SOCK_STREAM, 0);
    check(self->fd >= 0, "socket");
    check(bind(self->fd, (struct sockaddr *)&address, sizeof address) == 0, "bind");
    check(listen(self->fd, 4096) == 0, "listen");
}

static void *calls_make(const char *name)
{
    raw_socket *self = (raw_socket *)malloc(sizeof *self);
    self->lock_fd = -1;
    listen_at(self, name);
    return self;
}

static void calls_end(void *made)
{
    raw_socket *self = (raw_socket *)made;
    check(unlink(self->name) == 0, "unlink");
    close(self->fd);
    free(self);
}

static void *locked_make(const char *name)
{
    raw_socket *self = (raw_socket *)malloc(sizeof *self);
    struct stat opened;
    struct stat named;
    snprintf(self->lock, sizeof self->lock, "%s.lock", name);
    self->lock_fd = open(self->lock, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    check(self->lock_fd >= 0 && flock(self->lock_fd, LOCK_EX | LOCK_NB) == 0, "lock");
    check(fstat(self->lock_fd, &opened) == 0 && lstat(self->lock, &named) == 0 &&
              opened.st_ino == named.st_ino,
          "lock");
    check(lstat(name, &self->file) != 0 && errno == ENOENT, "lstat");
    listen_at(self, name);
    check(lstat(name, &self->file) == 0, "lstat");
    return self;
}

static void locked_end(void *made)
{
    raw_socket *self = (raw_socket *)made;
    struct stat found;
    check(lstat(self->name, &found) == 0 && found.st_ino == self->file.st_ino, "lstat");
    check(unlink(self->name) == 0 && unlink(self->lock) == 0, "unlink");
    close(self->lock_fd);
    close(self->fd);
    free(self);
}

static const socketed_maker calls = {calls_make, calls_end};
static const socketed_maker locked = {locked_make, locked_end};

static work_figures lives(const work_order *order)
{
    work_figures figures;
    socketed_enter();
    figures = socketed_lives(strcmp(order->kind, "calls") == 0 ? &calls : &locked, order);
    socketed_leave();
    return figures;
}

static const work_entry entries[] = {{"words", references},
                                     {"mutex", references},
                                     {"rwlock", references},
                                     {"calls", lives},
                                     {"calls-lock", lives}};

int main(int argc, char **argv)
{
    return work_main(argc, argv, entries, sizeof entries / sizeof entries[0]);
}
