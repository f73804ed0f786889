/* Values of many sizes through every kind of channel, in objects whose size the compiler sees at
   link time: it then warns of overflows in branches for other sizes, if the library lets it. lto.sh
   builds this.                                                                                */
#include <string.h>

#include "valkey_push.h"

static int failed;

static void check(bool condition)
{
    failed += condition ? 0 : 1;
}

#define CARRY(bytes)                                                                            \
    static void carry_##bytes(const char *in)                                                   \
    {                                                                                           \
        char sent[bytes];                                                                       \
        char out[bytes];                                                                        \
        vkp_mpsc_config mpsc = VKP_ZERO;                                                        \
        vkp_mpsc_tx *mpsc_tx = NULL;                                                            \
        vkp_mpsc_rx *mpsc_rx = NULL;                                                            \
        vkp_broadcast_config broadcast = VKP_ZERO;                                              \
        vkp_broadcast_tx *broadcast_tx = NULL;                                                  \
        vkp_broadcast_rx *broadcast_rx = NULL;                                                  \
        vkp_watch_config watch = VKP_ZERO;                                                      \
        vkp_watch_tx *watch_tx = NULL;                                                          \
        vkp_watch_rx *watch_rx = NULL;                                                          \
        vkp_oneshot slot;                                                                       \
        memcpy(sent, in, sizeof sent);                                                          \
        mpsc.elem_bytes = broadcast.elem_bytes = watch.elem_bytes = (bytes);                    \
        broadcast.capacity_items = 2;                                                           \
        check(vkp_mpsc_open(&mpsc, &mpsc_tx, &mpsc_rx) == VKP_OK &&                             \
              vkp_mpsc_send(mpsc_tx, sent, VKP_FOREVER) == VKP_OK &&                            \
              vkp_mpsc_try_send(mpsc_tx, sent) == VKP_OK &&                                     \
              vkp_mpsc_recv(mpsc_rx, VKP_FOREVER, out) == VKP_OK &&                             \
              vkp_mpsc_try_recv(mpsc_rx, out) == VKP_OK && memcmp(sent, out, sizeof out) == 0); \
        vkp_mpsc_tx_unref(mpsc_tx);                                                             \
        vkp_mpsc_rx_unref(mpsc_rx);                                                             \
        check(vkp_broadcast_open(&broadcast, &broadcast_tx) == VKP_OK &&                        \
              vkp_broadcast_subscribe(broadcast_tx, &broadcast_rx) == VKP_OK &&                 \
              vkp_broadcast_send(broadcast_tx, sent) == VKP_OK &&                               \
              vkp_broadcast_try_recv(broadcast_rx, out) == VKP_OK &&                            \
              memcmp(sent, out, sizeof out) == 0);                                              \
        vkp_broadcast_tx_unref(broadcast_tx);                                                   \
        vkp_broadcast_rx_unref(broadcast_rx);                                                   \
        check(vkp_watch_open(&watch, &watch_tx) == VKP_OK &&                                    \
              vkp_watch_subscribe(watch_tx, &watch_rx) == VKP_OK &&                             \
              vkp_watch_send(watch_tx, sent) == VKP_OK &&                                       \
              vkp_watch_get(watch_rx, out) == VKP_OK && memcmp(sent, out, sizeof out) == 0);    \
        vkp_watch_tx_unref(watch_tx);                                                           \
        vkp_watch_rx_unref(watch_rx);                                                           \
        if ((bytes) <= VKP_ONESHOT_BYTES) {                                                     \
            check(vkp_oneshot_init(&slot, NULL, (bytes), NULL, NULL) == VKP_OK &&               \
                  vkp_oneshot_send(&slot, sent) == VKP_OK &&                                    \
                  vkp_oneshot_recv(&slot, VKP_FOREVER, out) == VKP_OK &&                        \
                  memcmp(sent, out, sizeof out) == 0);                                          \
        }                                                                                       \
    }

CARRY(1)
CARRY(4)
CARRY(8)
CARRY(24)
CARRY(40)
CARRY(64)

int main(void)
{
    char in[64];
    memset(in, 7, sizeof in);
    carry_1(in);
    carry_4(in);
    carry_8(in);
    carry_24(in);
    carry_40(in);
    carry_64(in);
    return failed > 0;
}
