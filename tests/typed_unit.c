/* The typed macros as a C program uses them; see typed_unit.h. scripts/check_typed.sh compiles this
   file as C99 and as C++11 with every warning, test_typed.cpp runs it.
   SPDX-License-Identifier: MIT                                                                  */
#include "valkey_push.h"

#include "typed_unit.h"

struct job {
    uint64_t number;
    double weight;
    const char *name;
};

VKP_MPSC_TYPED(jobs, struct job);
VKP_MPSC_TYPED(ints, int);
VKP_ONESHOT_TYPED(job_slot, struct job);
VKP_ONESHOT_TYPED(int_slot, int);
VKP_BROADCAST_TYPED(job_cast, struct job);
VKP_BROADCAST_TYPED(int_cast, int);
VKP_WATCH_TYPED(job_watch, struct job);
VKP_WATCH_TYPED(int_watch, int);

/* For functions that leave nothing open when all answers are right. */
#define EXPECT(condition)    \
    do {                     \
        if (!(condition)) {  \
            return __LINE__; \
        }                    \
    } while (0)

static struct job job_of(uint64_t number)
{
    struct job made;
    made.number = number;
    made.weight = (double)number / 2;
    made.name = "job";
    return made;
}

static bool is_job(const struct job *job, uint64_t number)
{
    return job->number == number && job->weight * 2 == (double)number && job->name[0] == 'j';
}

static int jobs_of_a_struct(jobs_tx *tx, jobs_rx *rx)
{
    struct job several[3];
    struct job got = job_of(0);
    struct job *place;
    const struct job *oldest;
    vkp_mpsc_permit permit;
    vkp_case one;
    size_t count;
    several[0] = job_of(3);
    several[1] = job_of(4);
    EXPECT(jobs_try_recv(rx, &got) == VKP_ERR_EMPTY);
    EXPECT(jobs_send(tx, job_of(1), VKP_FOREVER) == VKP_OK);
    EXPECT(jobs_try_send(tx, job_of(2)) == VKP_OK);
    EXPECT(jobs_send_many(tx, several, 2, 0, &count) == VKP_OK && count == 2);
    EXPECT(jobs_try_send(tx, job_of(9)) == VKP_ERR_FULL);
    EXPECT(jobs_peek(rx, &oldest) == VKP_OK && is_job(oldest, 1));
    EXPECT(jobs_recv(rx, VKP_FOREVER, &got) == VKP_OK && is_job(&got, 1));
    EXPECT(jobs_reserve(tx, 0, &permit, &place) == VKP_OK);
    *place = job_of(5);
    vkp_mpsc_commit(&permit);
    EXPECT(jobs_try_recv(rx, &got) == VKP_OK && is_job(&got, 2));
    EXPECT(jobs_recv_many(rx, 0, several, 3, &count) == VKP_OK && count == 3);
    EXPECT(is_job(&several[0], 3) && is_job(&several[1], 4) && is_job(&several[2], 5));
    several[0] = job_of(6);
    one = jobs_case_send(tx, &several[0]);
    EXPECT(vkp_select(&one, 1, 0, &count) == VKP_OK && one.status == VKP_OK);
    EXPECT(vkp_mpsc_get_len(jobs_raw_rx(rx)) == 1 && vkp_mpsc_get_capacity(jobs_raw_tx(tx)) == 4);
    one = jobs_case_recv(rx, &got);
    EXPECT(vkp_select(&one, 1, 0, &count) == VKP_OK && is_job(&got, 6));
    EXPECT(jobs_peek(rx, &oldest) == VKP_ERR_EMPTY);
    jobs_close(rx);
    EXPECT(jobs_try_send(tx, job_of(7)) == VKP_ERR_CLOSED);
    EXPECT(jobs_reserve(tx, 0, &permit, &place) == VKP_ERR_CLOSED);
    EXPECT(jobs_recv(rx, VKP_FOREVER, &got) == VKP_ERR_CLOSED && is_job(&got, 6));
    return 0;
}

int typed_unit_mpsc(void)
{
    vkp_mpsc_config config = VKP_ZERO;
    jobs_tx *tx = NULL;
    jobs_rx *rx = NULL;
    ints_tx *int_tx = NULL;
    ints_tx *second = NULL;
    ints_rx *int_rx = NULL;
    int wrong;
    int got = 0;
    config.capacity_items = 4;
    config.elem_bytes = 1; /* the macro knows better */
    EXPECT(jobs_open(&config, &tx, &rx) == VKP_OK);
    wrong = jobs_of_a_struct(tx, rx);
    jobs_tx_unref(tx);
    jobs_rx_unref(rx);
    if (wrong != 0) {
        return wrong;
    }
    EXPECT(ints_open(NULL, &int_tx, &int_rx) == VKP_OK); /* all defaults: unbounded */
    second = ints_tx_ref(int_tx);
    EXPECT(ints_send(int_tx, -5, 0) == VKP_OK && ints_send(second, 6, 0) == VKP_OK);
    ints_tx_unref(int_tx);
    EXPECT(ints_recv(int_rx, 0, &got) == VKP_OK && got == -5);
    EXPECT(ints_recv(int_rx, 0, &got) == VKP_OK && got == 6);
    EXPECT(ints_try_recv(int_rx, &got) == VKP_ERR_EMPTY);
    ints_tx_unref(second);
    EXPECT(ints_try_recv(int_rx, &got) == VKP_ERR_CLOSED);
    ints_rx_unref(int_rx);
    return 0;
}

int typed_unit_oneshot(void)
{
    job_slot slot;
    int_slot other;
    int_slot *shared;
    vkp_case one;
    size_t won;
    struct job got = job_of(0);
    int number = 0;
    EXPECT(job_slot_init(&slot, NULL, NULL, NULL) == VKP_OK);
    EXPECT(job_slot_try_recv(&slot, &got) == VKP_ERR_EMPTY);
    EXPECT(job_slot_send(&slot, job_of(8)) == VKP_OK);
    EXPECT(job_slot_recv(&slot, VKP_FOREVER, &got) == VKP_OK && is_job(&got, 8));
    EXPECT(int_slot_init(&other, NULL, NULL, NULL) == VKP_OK);
    int_slot_close(&other);
    EXPECT(int_slot_send(&other, 5) == VKP_ERR_CLOSED);
    EXPECT(int_slot_init(&other, NULL, NULL, NULL) == VKP_OK);
    int_slot_abandon(&other);
    EXPECT(int_slot_recv(&other, VKP_FOREVER, &number) == VKP_ERR_CLOSED);
    EXPECT(int_slot_init(&other, NULL, NULL, NULL) == VKP_OK);
    EXPECT(int_slot_send(&other, -7) == VKP_OK);
    EXPECT(int_slot_try_recv(&other, &number) == VKP_OK && number == -7);
    EXPECT(int_slot_open(NULL, NULL, NULL, NULL) == VKP_ERR_INVALID);
    EXPECT(int_slot_open(NULL, NULL, NULL, &shared) == VKP_OK);
    EXPECT(!int_slot_is_closed(shared) && int_slot_wait_closed(shared, 0) == VKP_ERR_TIMEOUT);
    one = int_slot_case_closed(shared);
    EXPECT(vkp_select(&one, 1, 0, &won) == VKP_ERR_TIMEOUT);
    EXPECT(int_slot_send(shared, 9) == VKP_OK);
    one = int_slot_case_recv(shared, &number);
    EXPECT(vkp_select(&one, 1, 0, &won) == VKP_OK && one.status == VKP_OK && number == 9);
    int_slot_rx_unref(shared);
    EXPECT(int_slot_is_closed(shared));
    int_slot_tx_unref(shared);
    int_slot_rx_unref(NULL);
    int_slot_tx_unref(NULL);
    int_slot_close(NULL);
    int_slot_abandon(NULL);
    return 0;
}

int typed_unit_broadcast(void)
{
    vkp_broadcast_config config = VKP_ZERO;
    job_cast_tx *tx = NULL;
    job_cast_tx *second = NULL;
    job_cast_rx *rx = NULL;
    int_cast_tx *int_tx = NULL;
    int_cast_rx *int_rx = NULL;
    struct job got = job_of(0);
    int number = 0;
    config.capacity_items = 2;
    EXPECT(job_cast_open(&config, &tx) == VKP_OK);
    EXPECT(job_cast_send(tx, job_of(1)) == VKP_ERR_CLOSED);
    EXPECT(job_cast_subscribe(tx, &rx) == VKP_OK);
    EXPECT(vkp_broadcast_get_receivers(job_cast_raw_tx(tx)) == 1);
    EXPECT(job_cast_send(tx, job_of(1)) == VKP_OK && job_cast_send(tx, job_of(2)) == VKP_OK &&
           job_cast_send(tx, job_of(3)) == VKP_OK);
    EXPECT(job_cast_try_recv(rx, &got) == VKP_ERR_LAGGED);
    EXPECT(vkp_broadcast_get_missed(job_cast_raw_rx(rx)) == 1);
    EXPECT(job_cast_recv(rx, VKP_FOREVER, &got) == VKP_OK && is_job(&got, 2));
    second = job_cast_tx_ref(tx);
    job_cast_tx_unref(tx);
    EXPECT(job_cast_try_recv(rx, &got) == VKP_OK && is_job(&got, 3));
    EXPECT(job_cast_try_recv(rx, &got) == VKP_ERR_EMPTY);
    job_cast_tx_unref(second);
    EXPECT(job_cast_recv(rx, VKP_FOREVER, &got) == VKP_ERR_CLOSED);
    job_cast_rx_unref(rx);
    EXPECT(int_cast_open(&config, &int_tx) == VKP_OK);
    EXPECT(int_cast_subscribe(int_tx, &int_rx) == VKP_OK);
    EXPECT(int_cast_send(int_tx, -9) == VKP_OK);
    EXPECT(int_cast_recv(int_rx, 0, &number) == VKP_OK && number == -9);
    int_cast_tx_unref(int_tx);
    int_cast_rx_unref(int_rx);
    return 0;
}

int typed_unit_watch(void)
{
    job_watch_tx *tx = NULL;
    job_watch_rx *rx = NULL;
    int_watch_tx *int_tx = NULL;
    int_watch_rx *int_rx = NULL;
    struct job initial = job_of(1);
    struct job got = job_of(0);
    const struct job *borrowed;
    int number = 5;
    EXPECT(job_watch_open(NULL, &initial, &tx) == VKP_OK);
    EXPECT(job_watch_send(tx, job_of(2)) == VKP_ERR_CLOSED);
    EXPECT(job_watch_subscribe(tx, &rx) == VKP_OK);
    EXPECT(vkp_watch_get_receivers(job_watch_raw_tx(tx)) == 1);
    EXPECT(job_watch_get(rx, &got) == VKP_OK && is_job(&got, 1));
    EXPECT(job_watch_changed(rx, 0) == VKP_ERR_TIMEOUT);
    EXPECT(job_watch_send(tx, job_of(2)) == VKP_OK);
    EXPECT(vkp_watch_is_changed(job_watch_raw_rx(rx)));
    EXPECT(job_watch_changed(rx, VKP_FOREVER) == VKP_OK);
    borrowed = job_watch_borrow(rx);
    EXPECT(borrowed != NULL && is_job(borrowed, 2));
    EXPECT(job_watch_replace(tx, job_of(3)) == VKP_OK);
    EXPECT(is_job(borrowed, 2));
    job_watch_release(rx);
    EXPECT(job_watch_get(rx, &got) == VKP_OK && is_job(&got, 3));
    job_watch_tx_unref(tx);
    EXPECT(job_watch_changed(rx, VKP_FOREVER) == VKP_OK);
    EXPECT(job_watch_changed(rx, VKP_FOREVER) == VKP_ERR_CLOSED);
    job_watch_rx_unref(rx);
    EXPECT(int_watch_open(NULL, NULL, &int_tx) == VKP_OK);
    EXPECT(int_watch_subscribe(int_tx, &int_rx) == VKP_OK);
    EXPECT(int_watch_get(int_rx, &number) == VKP_OK && number == 0);
    EXPECT(int_watch_replace(int_tx, -1) == VKP_OK);
    EXPECT(int_watch_get(int_rx, &number) == VKP_OK && number == -1);
    int_watch_tx_unref(int_tx);
    int_watch_rx_unref(int_rx);
    return 0;
}
