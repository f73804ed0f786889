/* ======================================================================================
   >>config   Macros
   ======================================================================================
   VKP_IMPLEMENTATION   unset   in ONE file: compiles the implementation there
   VKP_STATIC           unset   everywhere it is used: all functions are static, a private copy
   VKP_API              extern  everywhere: linkage of the functions (visibility attributes)
   VKP_ASSERT(x)        nothing implementation: programmer's errors; the call returns INVALID too
   VKP_NO_IO            unset   implementation: channels only, no loop, RESP, sockets, client,
                                relay; a file that defines it sees no others declared
*/
#ifdef VKP_IMPLEMENTATION /* before the first system header of this file */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1
#elif defined(__APPLE__) && !defined(_DARWIN_C_SOURCE)
#define _DARWIN_C_SOURCE 1
#endif
#endif

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
