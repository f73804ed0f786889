/* An io_uring for the benchmarks, in its cheapest form: one thread, completions deferred to the
   call that waits, files registered. VKP_BENCH_URING is 0 where the headers know none like it.
   SPDX-License-Identifier: MIT */
#ifndef VKP_BENCH_URING_H
#define VKP_BENCH_URING_H

#include "bench.h"

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#endif
#endif
#ifdef IORING_SETUP_DEFER_TASKRUN /* Linux 6.1 */
#define VKP_BENCH_URING 1
#include <sys/mman.h>
#include <sys/syscall.h>

#define URING_ENTRIES 256u
#define URING_FILES 2048u /* registered, by descriptor */
#define URING_BUFFERS 1024u
#define URING_BUFFER_BYTES 2048u

typedef struct uring {
    int fd;
    unsigned *sq_tail;
    unsigned *cq_head;
    unsigned *cq_tail;
    unsigned cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    unsigned pending; /* sqes filled, not submitted */
    bool has_files;
    struct io_uring_buf_ring *buffer_ring;
    unsigned char *buffers;
    uint16_t buffer_tail;
} uring;

static void *uring_map(int fd, size_t bytes, off_t offset)
{
    int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags | MAP_POPULATE, fd, offset);
    return at == MAP_FAILED ? NULL : at;
}

/* False: the kernel has none, or refuses it. The process's end gives everything back. */
BENCH_UNUSED static bool uring_open(uring *self, unsigned flags)
{
    struct io_uring_params params;
    size_t bytes;
    unsigned char *rings;
    unsigned *order;
    unsigned i;
    memset(&params, 0, sizeof params);
    memset(self, 0, sizeof *self);
    params.flags = flags | IORING_SETUP_CQSIZE;
    params.cq_entries = 4 * URING_BUFFERS;
    self->fd = (int)syscall(SYS_io_uring_setup, URING_ENTRIES, &params);
    if (self->fd < 0) {
        return false;
    }
    bytes = params.sq_off.array + params.sq_entries * sizeof *order;
    if (bytes < params.cq_off.cqes + params.cq_entries * sizeof *self->cqes) {
        bytes = params.cq_off.cqes + params.cq_entries * sizeof *self->cqes;
    }
    rings = (unsigned char *)uring_map(self->fd, bytes, IORING_OFF_SQ_RING);
    self->sqes = (struct io_uring_sqe *)uring_map(self->fd, params.sq_entries * sizeof *self->sqes,
                                                  IORING_OFF_SQES);
    if (rings == NULL || self->sqes == NULL) {
        close(self->fd);
        return false;
    }
    self->sq_tail = (unsigned *)(void *)(rings + params.sq_off.tail);
    self->cq_head = (unsigned *)(void *)(rings + params.cq_off.head);
    self->cq_tail = (unsigned *)(void *)(rings + params.cq_off.tail);
    self->cq_mask = params.cq_entries - 1;
    self->cqes = (struct io_uring_cqe *)(void *)(rings + params.cq_off.cqes);
    order = (unsigned *)(void *)(rings + params.sq_off.array);
    for (i = 0; i < params.sq_entries; i++) {
        order[i] = i;
    }
    return true;
}

/* Register no files yet, but room for them. */
BENCH_UNUSED static void uring_open_files(uring *self)
{
    static int none[URING_FILES];
    memset(none, 0xff, sizeof none);
    if (syscall(SYS_io_uring_register, self->fd, IORING_REGISTER_FILES, none, URING_FILES) < 0) {
        bench_fail("io_uring: no room for registered files: %s", strerror(errno));
    }
    self->has_files = true;
}

BENCH_UNUSED static void uring_set_file(uring *self, int fd, bool on)
{
    struct io_uring_files_update update;
    int value = on ? fd : -1;
    memset(&update, 0, sizeof update);
    update.offset = (unsigned)fd;
    update.fds = (uint64_t)(uintptr_t)&value;
    if (syscall(SYS_io_uring_register, self->fd, IORING_REGISTER_FILES_UPDATE, &update, 1) < 0) {
        bench_fail("io_uring: a file is not registered: %s", strerror(errno));
    }
}

static void uring_give_buffer(uring *self, unsigned id)
{
    struct io_uring_buf *buffer =
        &self->buffer_ring->bufs[self->buffer_tail++ & (URING_BUFFERS - 1)];
    buffer->addr = (uint64_t)(uintptr_t)(self->buffers + id * URING_BUFFER_BYTES);
    buffer->len = URING_BUFFER_BYTES;
    buffer->bid = (uint16_t)id;
    __atomic_store_n(&self->buffer_ring->tail, self->buffer_tail, __ATOMIC_RELEASE);
}

/* Buffers for multishot receives, group 1. */
BENCH_UNUSED static void uring_open_buffers(uring *self)
{
    struct io_uring_buf_reg reg;
    unsigned i;
    memset(&reg, 0, sizeof reg);
    self->buffer_ring =
        (struct io_uring_buf_ring *)uring_map(-1, URING_BUFFERS * sizeof(struct io_uring_buf), 0);
    self->buffers = (unsigned char *)uring_map(-1, (size_t)URING_BUFFERS * URING_BUFFER_BYTES, 0);
    reg.ring_addr = (uint64_t)(uintptr_t)self->buffer_ring;
    reg.ring_entries = URING_BUFFERS;
    reg.bgid = 1;
    if (self->buffer_ring == NULL || self->buffers == NULL ||
        syscall(SYS_io_uring_register, self->fd, IORING_REGISTER_PBUF_RING, &reg, 1) < 0) {
        bench_fail("io_uring: no ring of buffers: %s", strerror(errno));
    }
    for (i = 0; i < URING_BUFFERS; i++) {
        uring_give_buffer(self, i);
    }
}

/* An operation to fill in; at most URING_ENTRIES before the next submit. */
static struct io_uring_sqe *uring_next(uring *self, int opcode, int fd, uint64_t data)
{
    struct io_uring_sqe *sqe =
        &self->sqes[(*self->sq_tail + self->pending++) & (URING_ENTRIES - 1)];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = (uint8_t)opcode;
    sqe->fd = fd;
    sqe->flags = self->has_files ? IOSQE_FIXED_FILE : 0;
    sqe->user_data = data;
    return sqe;
}

BENCH_UNUSED static void uring_send(uring *self, int fd, const void *data, size_t len,
                                    uint64_t user)
{
    struct io_uring_sqe *sqe = uring_next(self, IORING_OP_SEND, fd, user);
    sqe->addr = (uint64_t)(uintptr_t)data;
    sqe->len = (uint32_t)len;
    sqe->msg_flags = MSG_DONTWAIT | MSG_NOSIGNAL;
}

/* One system call: submit what is pending, wait for so many completions. */
static void uring_submit(uring *self, unsigned complete)
{
    long taken;
    __atomic_store_n(self->sq_tail, *self->sq_tail + self->pending, __ATOMIC_RELEASE);
    taken = syscall(SYS_io_uring_enter, self->fd, self->pending, complete, IORING_ENTER_GETEVENTS,
                    NULL, 0);
    if (taken != (long)self->pending) {
        bench_fail("io_uring: %ld of %u submitted: %s", taken, self->pending, strerror(errno));
    }
    self->pending = 0;
}

/* The next completion, or NULL; taken with uring_took. */
static const struct io_uring_cqe *uring_peek(const uring *self)
{
    unsigned head = *self->cq_head;
    return head != __atomic_load_n(self->cq_tail, __ATOMIC_ACQUIRE)
               ? &self->cqes[head & self->cq_mask]
               : NULL;
}

static void uring_took(uring *self)
{
    __atomic_store_n(self->cq_head, *self->cq_head + 1, __ATOMIC_RELEASE);
}
#else
#define VKP_BENCH_URING 0
#endif
#endif
