/* A disk in memory for models of sockets: files, descriptors, binds, locks, of one execution. Each
   call that leaves a mark is a step of its own, before which other threads may go. What the library
   asks of the system beyond that is not there: a call of it ends the checker.                  */
#ifndef DISK_H
#define DISK_H

#include "valkey_push.h"

#include <stdbool.h>
#include <stdint.h>

/* An empty one. `by_hand`: what looks only is a step, too. */
void disk_format(bool by_hand);

/* Its calls, in place of the system's. */
void disk_install(vkp_sys *sys);

/* The file of that name; 0: none. No two files of one execution are the same number. */
unsigned disk_file(const char *path);

/* The newest number so far. */
unsigned disk_newest_file(void);

/* Whether somebody listens at the socket of that name, or holds the lock of that file. */
bool disk_answers(const char *path);
bool disk_is_locked(const char *path);

/* How often a socket was bound at that name. */
unsigned disk_binds(const char *path);

/* Nothing is left: no file, no descriptor. */
bool disk_is_empty(void);

/* The program's own doings, no steps: a socket that listens at the path, or -1 where a file stands
   already; the end of one. The library must leave such a file alone until it was handed over.  */
int disk_move_in(const char *path);
void disk_hand_over(int fd);
void disk_move_out(int fd);

/* The program's file, or somebody else's; whoever would remove a file asks before. */
void disk_remove(const char *path);
extern void (*disk_on_unlink)(const char *path, unsigned file);

/* The thread's n-th call that leaves a mark does not return before disk_go_on. 0: all return. */
void disk_stop(unsigned thread, unsigned nth);
void disk_go_on(void);

#endif
