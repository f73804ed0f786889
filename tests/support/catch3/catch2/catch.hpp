/* Version 3 of Catch2 under version 2's name. On the include path only when version 3 is used.
   SPDX-License-Identifier: MIT */
#include <catch2/catch_all.hpp>
