/* The implementation's unit. The second include must change nothing. */
#define VKP_IMPLEMENTATION
#include "valkey_push.h"
#include "valkey_push.h"
