/* What the models of all families share. */
#ifndef ENVIRONMENT_H
#define ENVIRONMENT_H

#include "valkey_push.h"

#include "model.h"

/* The checker's system and allocator, with or without membarrier as the model says. */
const vkp_env *environment(void);

#endif
