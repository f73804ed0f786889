// A program from outside the tree, in C++: a value goes from one thread to another.
// SPDX-License-Identifier: MIT
#include <valkey_push.h>

#include <iostream>
#include <thread>

VKP_MPSC_TYPED(numbers, int);

int main()
{
    vkp_mpsc_config config = VKP_ZERO;
    numbers_tx *tx = nullptr;
    numbers_rx *rx = nullptr;
    if (numbers_open(&config, &tx, &rx) != VKP_OK) {
        return 1;
    }
    vkp_status sent = VKP_ERR_INVALID;
    std::thread sender([&] { sent = numbers_send(tx, 42, VKP_FOREVER); });
    int number = 0;
    vkp_status received = numbers_recv(rx, VKP_FOREVER, &number);
    sender.join();
    numbers_tx_unref(tx);
    numbers_rx_unref(rx);
    std::cout << number << " " << vkp_status_str(received) << " " << vkp_version_str() << "\n";
    return sent == VKP_OK && received == VKP_OK && number == 42 ? 0 : 1;
}
