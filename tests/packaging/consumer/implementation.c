/* The way without the library: the implementation in one file of the program.
   SPDX-License-Identifier: MIT */
#define VKP_IMPLEMENTATION
#include <valkey_push.h>
