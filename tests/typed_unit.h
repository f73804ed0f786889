/* The typed macros in a unit that is C99 and C++11 at once.
   SPDX-License-Identifier: MIT */
#ifndef VKP_TEST_TYPED_UNIT_H
#define VKP_TEST_TYPED_UNIT_H

#ifdef __cplusplus
extern "C" {
#endif

/* Each uses one macro with a struct and with an int: 0, or the line of the first wrong answer. */
int typed_unit_mpsc(void);
int typed_unit_oneshot(void);
int typed_unit_broadcast(void);
int typed_unit_watch(void);

#ifdef __cplusplus
}
#endif

#endif /* VKP_TEST_TYPED_UNIT_H */
