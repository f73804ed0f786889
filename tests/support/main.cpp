/* The one main of all Catch2 tests, for version 2 and 3. SIGPIPE keeps its default: a send that
   raises it must end the test, as it would end a program.
   SPDX-License-Identifier: MIT */
#define CATCH_CONFIG_RUNNER
#include "catch.hpp"

int main(int argc, char **argv)
{
    return Catch::Session().run(argc, argv);
}
