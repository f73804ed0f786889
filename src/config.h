/* ======================================================================================
   >>config   Macros
   ======================================================================================
   Macro                unset means   define it
   VKP_IMPLEMENTATION   declarations  in ONE file, before its first #include: the implementation
                                      is compiled there
   VKP_STATIC           extern        in the one file that uses the library: all functions are
                                      static, and only that file can call them
   VKP_API              extern        in every file alike, backends included: the linkage of what
                                      the library defines. A shared library of several files that
                                      keeps its copy to itself defines it as
                                      extern __attribute__((visibility("hidden")))
   VKP_ASSERT(x)        nothing       with the implementation: a programmer's error asserts, and
                                      the call returns INVALID as well
   VKP_NO_IO            everything    with the implementation: channels only, without loop, RESP,
                                      sockets, client and relay; a file that defines it sees no
                                      other declarations
*/
#ifdef VKP_IMPLEMENTATION /* before the first system header of this file */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1
#elif defined(__APPLE__) && !defined(_DARWIN_C_SOURCE)
#define _DARWIN_C_SOURCE 1
#endif
#endif

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifndef VKP_API
#ifdef VKP_STATIC
#define VKP_API static __attribute__((unused))
#else
#define VKP_API extern
#endif
#endif

#ifdef VKP_STATIC
#define VKP_API_DATA extern /* a backend is compiled in a file of its own */
#else
#define VKP_API_DATA VKP_API
#endif

#if defined(VKP_STATIC) && !defined(VKP_IMPLEMENTATION)
#error "VKP_STATIC is for the one file that defines VKP_IMPLEMENTATION; for several use VKP_API"
#endif

#if defined(__GNUC__) || defined(__clang__)
#define VKP_NODISCARD __attribute__((warn_unused_result))
#else
#error "valkey_push.h needs GCC or Clang (builtin atomics)"
#endif

#ifdef __cplusplus
#define VKP_ZERO \
    {            \
    }
#else
#define VKP_ZERO \
    {            \
        0        \
    }
#endif

#define VKP_VERSION_MAJOR 0
#define VKP_VERSION_MINOR 1
#define VKP_VERSION_PATCH 0
#define VKP_VERSION_STR "0.1.0"
