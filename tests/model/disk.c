#include "disk.h"

#include "model.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#define NAMES 8
#define FILES 64
#define DESCRIPTORS 128
#define FIRST_FD 3
#define USER 1000
#define PROCESS 42

struct name {
    char text[32];
    unsigned file;
    unsigned binds;
};

struct file {
    bool is_socket;
    bool is_foreign; /* the program's, not the library's to remove */
    int fd;          /* bound to it, or with its lock; 0: none */
};

/* A number is not used again within an execution: who closes twice is found out. */
struct descriptor {
    bool open;
    bool listens;
    unsigned file;
};

static struct {
    struct name names[NAMES];
    struct file files[FILES];
    struct descriptor descriptors[DESCRIPTORS];
    unsigned names_used;
    unsigned files_used;
    int next_fd;
    bool by_hand;
    unsigned stopped;
    unsigned countdown;
    uint32_t going;
} disk;

void (*disk_on_unlink)(const char *path, unsigned file);

static struct name *name_of(const char *path)
{
    unsigned i;
    for (i = 0; i < disk.names_used; i++) {
        if (strcmp(disk.names[i].text, path) == 0) {
            return &disk.names[i];
        }
    }
    MODEL_CHECK(disk.names_used < NAMES && strlen(path) < sizeof disk.names[0].text);
    strcpy(disk.names[i].text, path);
    disk.names_used++;
    return &disk.names[i];
}

static struct name *name_at(const void *address, uint32_t bytes)
{
    struct sockaddr_un unix_name;
    MODEL_CHECK(bytes <= sizeof unix_name);
    memcpy(&unix_name, address, bytes);
    MODEL_CHECK(unix_name.sun_family == AF_UNIX);
    return name_of(unix_name.sun_path);
}

static unsigned create(struct name *name, bool is_socket)
{
    struct file *fresh = &disk.files[disk.files_used];
    MODEL_CHECK(disk.files_used < FILES);
    fresh->is_socket = is_socket;
    name->file = disk.files_used++;
    return name->file;
}

static int open_descriptor(void)
{
    MODEL_CHECK(disk.next_fd < DESCRIPTORS);
    disk.descriptors[disk.next_fd].open = true;
    return disk.next_fd++;
}

static struct descriptor *descriptor_of(int fd)
{
    MODEL_CHECK(fd >= FIRST_FD && fd < disk.next_fd && disk.descriptors[fd].open);
    return &disk.descriptors[fd];
}

static void stop(void)
{
    if (disk.countdown > 0 && model_thread() == disk.stopped && --disk.countdown == 0) {
        model_note("is stopped in a call of the system");
        while (disk.going == 0) {
            (void)model_sleep((uintptr_t)&disk.going, 0, VKP_FOREVER);
        }
        model_note("goes on");
    }
}

static void mark(void)
{
    model_step();
    stop();
}

static void look(void)
{
    if (disk.by_hand) {
        model_step();
    }
}

/* ---- the library's calls ---- */

static int disk_socket(int family, int type)
{
    MODEL_CHECK(family == AF_UNIX && type == SOCK_STREAM);
    return open_descriptor();
}

static int disk_bind(int fd, const void *address, uint32_t bytes, uint32_t mode)
{
    struct name *name = name_at(address, bytes);
    MODEL_CHECK(mode == 0600);
    mark();
    if (name->file != 0) {
        return -EADDRINUSE;
    }
    descriptor_of(fd)->file = create(name, true);
    disk.files[name->file].fd = fd;
    name->binds++;
    model_note("binds %s: file %u, descriptor %d", name->text, name->file, fd);
    return 0;
}

static int disk_listen(int fd, int backlog)
{
    mark();
    MODEL_CHECK(backlog > 0 && descriptor_of(fd)->file != 0);
    descriptor_of(fd)->listens = true;
    return 0;
}

static int disk_connect(int fd, const void *address, uint32_t bytes)
{
    const struct name *name = name_at(address, bytes);
    look();
    (void)descriptor_of(fd);
    if (name->file == 0) {
        return -ENOENT;
    }
    return disk_answers(name->text) ? 0 : -ECONNREFUSED;
}

static int disk_prepare(int fd)
{
    (void)descriptor_of(fd);
    return 0;
}

static int disk_close(int fd)
{
    struct descriptor *closed;
    mark();
    closed = descriptor_of(fd);
    model_note("closes descriptor %d", fd);
    closed->open = false;
    if (disk.files[closed->file].fd == fd) {
        disk.files[closed->file].fd = 0;
    }
    return 0;
}

static int identify(const char *path, vkp_file_id *id)
{
    const struct name *name = name_of(path);
    memset(id, 0, sizeof *id);
    if (name->file == 0) {
        return -ENOENT;
    }
    id->device = 1;
    id->inode = name->file;
    id->uid = USER;
    id->mode = 0600;
    id->is_socket = disk.files[name->file].is_socket;
    return 0;
}

static int disk_identify(const char *path, vkp_file_id *id)
{
    model_step();
    return identify(path, id);
}

/* The system's own, call by call: the lock counts only while the file is the one at the path. */
static int disk_lock_file(const char *path, vkp_file_id *id)
{
    struct name *name = name_of(path);
    for (;;) {
        unsigned file;
        int fd;
        mark();
        file = name->file != 0 ? name->file : create(name, false);
        look();
        if (disk.files[file].fd != 0) {
            return -EWOULDBLOCK;
        }
        fd = open_descriptor();
        descriptor_of(fd)->file = file;
        disk.files[file].fd = fd;
        model_note("locks %s: file %u, descriptor %d", path, file, fd);
        look();
        (void)identify(path, id);
        if (id->inode == file) {
            return fd;
        }
        (void)disk_close(fd);
    }
}

static int disk_chmod(const char *path, uint32_t mode)
{
    look();
    MODEL_CHECK(mode == 0600);
    return name_of(path)->file != 0 ? 0 : -ENOENT;
}

/* Systems cannot remove a file only if it is a certain one: what another program puts there just
   after the library looked is lost. So no step is between the two, unless all keep to the locks. */
static int disk_unlink(const char *path)
{
    look();
    stop();
    if (name_of(path)->file == 0) {
        return -ENOENT;
    }
    model_note("removes %s: file %u", path, name_of(path)->file);
    MODEL_CHECK(!disk.files[name_of(path)->file].is_foreign);
    disk_on_unlink(path, name_of(path)->file);
    name_of(path)->file = 0;
    return 0;
}

static uint32_t disk_user_id(void)
{
    return USER;
}

static int disk_process_id(void)
{
    return PROCESS;
}

/* So that the models can tell which names share a chain. */
static uint64_t disk_random(void)
{
    return 0;
}

void disk_install(vkp_sys *sys)
{
    sys->random_u64 = disk_random;
    sys->process_id = disk_process_id;
    sys->user_id = disk_user_id;
    sys->socket = disk_socket;
    sys->bind = disk_bind;
    sys->listen = disk_listen;
    sys->connect = disk_connect;
    sys->prepare = disk_prepare;
    sys->close = disk_close;
    sys->lock_file = disk_lock_file;
    sys->identify = disk_identify;
    sys->chmod = disk_chmod;
    sys->unlink = disk_unlink;
}

/* ---- the models' ---- */

void disk_format(bool by_hand)
{
    memset(&disk, 0, sizeof disk);
    disk.files_used = 1; /* 0 means none */
    disk.next_fd = FIRST_FD;
    disk.by_hand = by_hand;
}

unsigned disk_file(const char *path)
{
    return name_of(path)->file;
}

unsigned disk_newest_file(void)
{
    return disk.files_used - 1;
}

bool disk_answers(const char *path)
{
    const struct file *file = &disk.files[name_of(path)->file];
    return file->is_socket && file->fd != 0 && disk.descriptors[file->fd].listens;
}

bool disk_is_locked(const char *path)
{
    const struct file *file = &disk.files[name_of(path)->file];
    return !file->is_socket && file->fd != 0;
}

unsigned disk_binds(const char *path)
{
    return name_of(path)->binds;
}

bool disk_is_empty(void)
{
    unsigned i;
    for (i = 0; i < disk.names_used; i++) {
        if (disk.names[i].file != 0) {
            model_note("%s is left", disk.names[i].text);
            return false;
        }
    }
    for (i = FIRST_FD; i < (unsigned)disk.next_fd; i++) {
        if (disk.descriptors[i].open) {
            model_note("descriptor %u is left open", i);
            return false;
        }
    }
    return true;
}

int disk_move_in(const char *path)
{
    struct name *name = name_of(path);
    int fd;
    if (name->file != 0) {
        return -1;
    }
    fd = open_descriptor();
    descriptor_of(fd)->file = create(name, true);
    descriptor_of(fd)->listens = true;
    disk.files[name->file].fd = fd;
    disk.files[name->file].is_foreign = true;
    model_note("binds %s itself: file %u, descriptor %d", path, name->file, fd);
    return fd;
}

void disk_hand_over(int fd)
{
    disk.files[descriptor_of(fd)->file].is_foreign = false;
}

void disk_move_out(int fd)
{
    unsigned file = descriptor_of(fd)->file;
    unsigned i;
    descriptor_of(fd)->open = false;
    disk.files[file].fd = 0;
    for (i = 0; i < disk.names_used; i++) {
        if (disk.names[i].file == file) {
            disk.names[i].file = 0;
        }
    }
}

void disk_remove(const char *path)
{
    name_of(path)->file = 0;
}

void disk_stop(unsigned thread, unsigned nth)
{
    disk.stopped = thread;
    disk.countdown = nth;
}

void disk_go_on(void)
{
    disk.going = 1;
    model_wake((uintptr_t)&disk.going);
}
