/* One of two units of a program. */
#ifndef VKP_TEST_COMPILE_UNIT_H
#define VKP_TEST_COMPILE_UNIT_H

/* 0 when a channel of its own carried a value. */
int unit_runs(void);

#endif
