/* Platform facts and the system headers of the implementation. VKP_I_LINUX, VKP_I_APPLE and
   VKP_I_IO are always defined, as 0 or 1: test them with #if. Feature macros (_GNU_SOURCE ...) are
   set at the top of the header, before the first system header. */
#if !defined(__linux__) && !defined(__APPLE__) && !defined(__FreeBSD__) && \
    !defined(__OpenBSD__) && !defined(__NetBSD__) && !defined(__DragonFly__)
#error "valkey_push.h supports Linux, macOS and the BSDs"
#endif

#ifdef __linux__
#define VKP_I_LINUX 1
#else
#define VKP_I_LINUX 0
#endif
#ifdef __APPLE__
#define VKP_I_APPLE 1
#else
#define VKP_I_APPLE 0
#endif
#ifdef VKP_NO_IO
#define VKP_I_IO 0
#else
#define VKP_I_IO 1
#endif

#include <errno.h>
#include <float.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#if VKP_I_LINUX
#include <sys/random.h>
#include <sys/syscall.h>
#if !defined(__USE_GNU) && defined(__GLIBC__)
#error \
    "define VKP_IMPLEMENTATION before the FIRST include of this file, or build with -D_GNU_SOURCE"
#endif
#endif
#if VKP_I_IO
#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#if VKP_I_LINUX
#include <sys/epoll.h>
#include <sys/eventfd.h>
#else
#pragma push_macro("EV_ERROR") /* an enumerator of libev's <ev.h>, which programs may include */
#include <sys/event.h>
#pragma pop_macro("EV_ERROR")
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif
