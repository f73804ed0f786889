/* VKP_TEST_SANITIZED: whether this is compiled with AddressSanitizer or ThreadSanitizer, 0 or 1.
   SPDX-License-Identifier: MIT */
#ifndef VKP_TEST_SANITIZED_H
#define VKP_TEST_SANITIZED_H

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define VKP_TEST_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define VKP_TEST_SANITIZED 1
#endif
#endif
#ifndef VKP_TEST_SANITIZED
#define VKP_TEST_SANITIZED 0
#endif

#endif /* VKP_TEST_SANITIZED_H */
