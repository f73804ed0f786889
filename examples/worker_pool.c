/* cc -I. examples/worker_pool.c backends/vkp_backend_poll.c -pthread -o worker_pool
   SPDX-License-Identifier: MIT

   Four threads take jobs from one channel; each job is answered through a one-shot. A receiver is
   used by one thread at a time: a mutex hands it from worker to worker. docs/recipes/worker-pool.md
   says when one channel per worker is better.                                                 */
#define VKP_IMPLEMENTATION
#include "valkey_push.h"

#include <pthread.h>
#include <stdio.h>

#define WORKERS 4
#define JOBS 64
#define ROOM 8 /* jobs queued at most: then vkp_mpsc_send waits */

VKP_ONESHOT_TYPED(answer, uint64_t);

typedef struct job {
    uint64_t number;
    answer *reply; /* in the asker's memory */
} job;

VKP_MPSC_TYPED(jobs, job);

typedef struct pool {
    pthread_mutex_t lock; /* held to receive, not to work */
    jobs_rx *rx;
} pool;

typedef struct worker {
    pthread_t thread;
    pool *shared;
    unsigned done;
} worker;

/* The work: how many primes are there up to this number? */
static uint64_t count_primes(uint64_t limit)
{
    uint64_t count = 0, number, divisor;
    for (number = 2; number <= limit; number++) {
        for (divisor = 2; divisor * divisor <= number && number % divisor != 0; divisor++) {
        }
        count += divisor * divisor > number;
    }
    return count;
}

/* A worker waits for a job under the lock; the other idle workers wait for the lock. */
static void *run_worker(void *user)
{
    worker *self = (worker *)user;
    for (;;) {
        job next;
        vkp_status status;
        (void)pthread_mutex_lock(&self->shared->lock);
        status = jobs_recv(self->shared->rx, VKP_FOREVER, &next);
        (void)pthread_mutex_unlock(&self->shared->lock);
        if (status != VKP_OK) {
            return NULL; /* CLOSED: no sender is left, and the channel is empty */
        }
        if (answer_send(next.reply, count_primes(next.number)) == VKP_OK) {
            self->done++; /* else the asker closed its slot: the answer is not needed */
        }
    }
}

/* The channel's drop: the asker of a job that no worker took receives CLOSED. */
static void drop_job(void *user, void *item)
{
    (void)user;
    answer_abandon(((job *)item)->reply);
}

static unsigned ask_all(jobs_tx *tx)
{
    answer replies[JOBS];
    unsigned asked, right = 0, i;
    uint64_t got;
    for (asked = 0; asked < JOBS; asked++) {
        job next = {.number = 100 * (asked + 1), .reply = &replies[asked]};
        if (answer_init(next.reply, NULL, NULL, NULL) != VKP_OK ||
            jobs_send(tx, next, VKP_FOREVER) != VKP_OK) {
            break;
        }
    }
    for (i = 0; i < asked; i++) { /* no deadline: the workers use the slots until they answered */
        right += answer_recv(&replies[i], VKP_FOREVER, &got) == VKP_OK &&
                 got == count_primes(100 * (i + 1));
    }
    return right;
}

int main(void)
{
    vkp_mpsc_config config = {.capacity_items = ROOM, .drop = drop_job};
    pool shared = {.lock = PTHREAD_MUTEX_INITIALIZER};
    worker workers[WORKERS];
    jobs_tx *tx;
    unsigned started, right = 0, i;
    if (jobs_open(&config, &tx, &shared.rx) != VKP_OK) {
        return 1;
    }
    for (started = 0; started < WORKERS; started++) {
        workers[started] = (worker){.shared = &shared};
        if (pthread_create(&workers[started].thread, NULL, run_worker, &workers[started]) != 0) {
            break;
        }
    }
    if (started > 0) { /* fewer than wanted: the work takes longer */
        right = ask_all(tx);
    }
    jobs_tx_unref(tx); /* the last sender: each worker receives CLOSED and ends */
    for (i = 0; i < started; i++) {
        (void)pthread_join(workers[i].thread, NULL);
        printf("worker %u: %u jobs\n", i, workers[i].done);
    }
    jobs_rx_unref(shared.rx);
    printf("%u of %u answers right\n", right, (unsigned)JOBS);
    return right != JOBS;
}
