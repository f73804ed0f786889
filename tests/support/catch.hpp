/* Catch2, version 2 or 3: what the tests use, both have. SPDX-License-Identifier: MIT */
#ifndef VKP_TEST_CATCH_HPP
#define VKP_TEST_CATCH_HPP

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif

#endif
