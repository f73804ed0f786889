/* VKP_TEST_SANITIZED: whether this is compiled with AddressSanitizer or ThreadSanitizer, 0 or 1.
   VKP_TEST_TSAN: the same of ThreadSanitizer alone.
   SPDX-License-Identifier: MIT */
#ifndef VKP_TEST_SANITIZED_H
#define VKP_TEST_SANITIZED_H

#if defined(__SANITIZE_THREAD__)
#define VKP_TEST_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define VKP_TEST_TSAN 1
#endif
#endif
#ifndef VKP_TEST_TSAN
#define VKP_TEST_TSAN 0
#endif

#if VKP_TEST_TSAN || defined(__SANITIZE_ADDRESS__)
#define VKP_TEST_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define VKP_TEST_SANITIZED 1
#endif
#endif
#ifndef VKP_TEST_SANITIZED
#define VKP_TEST_SANITIZED 0
#endif

#endif /* VKP_TEST_SANITIZED_H */
