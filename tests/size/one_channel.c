/* The program that pays for one channel: size.sh looks at how large it is.
   SPDX-License-Identifier: MIT                                                                  */
#include "valkey_push.h"

int main(void)
{
    vkp_mpsc_config config = {.elem_bytes = sizeof(int)};
    vkp_mpsc_tx *tx;
    vkp_mpsc_rx *rx;
    int value = 7;
    int got = 0;
    if (vkp_mpsc_open(&config, &tx, &rx) != VKP_OK ||
        vkp_mpsc_send(tx, &value, VKP_FOREVER) != VKP_OK ||
        vkp_mpsc_recv(rx, VKP_FOREVER, &got) != VKP_OK) {
        return 1;
    }
    vkp_mpsc_tx_unref(tx);
    vkp_mpsc_rx_unref(rx);
    return got == value ? 0 : 1;
}
