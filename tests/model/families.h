/* The families of models, and what their ordinary run amounts to at least. */
#ifndef FAMILIES_H
#define FAMILIES_H

#include <stdbool.h>
#include <stdint.h>

struct model_family {
    const char *name;     /* its models' names begin with it and a space */
    const char *prefixes; /* of the functions that are its algorithm, each followed by a space */
    void (*add)(void);
    unsigned models;
    uint64_t executions;
    bool sleeps;   /* a lost unpark must not stay unseen, */
    bool barriers; /* nor a membarrier that does nothing, */
    bool locks;    /* nor locks left out, */
    bool releases; /* nor releases and acquires weakened */
};

void checker_models(void);
void parker_models(void);
void mpsc_models(void);
void oneshot_models(void);
void cancel_models(void);
void broadcast_models(void);
void watch_models(void);
void select_models(void);
void socket_models(void);

#endif
