/* Declarations before anything else was included, and again: the header must stand alone. */
#include "valkey_push.h"
#include "valkey_push.h"

#include "unit.h"

int unit_runs(void)
{
    vkp_mpsc_config config = VKP_ZERO;
    vkp_mpsc_tx *tx = NULL;
    vkp_mpsc_rx *rx = NULL;
    int sent = 42;
    int received = 0;
    config.elem_bytes = sizeof sent;
    if (vkp_mpsc_open(&config, &tx, &rx) != VKP_OK) {
        return 1;
    }
    vkp_status status = vkp_mpsc_try_send(tx, &sent);
    if (status == VKP_OK) {
        status = vkp_mpsc_recv(rx, VKP_FOREVER, &received);
    }
    vkp_mpsc_tx_unref(tx);
    vkp_mpsc_rx_unref(rx);
    return status == VKP_OK && received == sent ? 0 : 1;
}
