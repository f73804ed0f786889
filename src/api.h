#ifdef __cplusplus
extern "C" {
#endif

/* ======================================================================================
   >>api   Declarations
   ======================================================================================
   Contracts name: who owns what (takes, borrows, shares, gives, views), whether the call may
   wait, from which threads it may come, whether it is legal inside callbacks, and its errors.
   "Loop" as a thread means: the thread that opened the loop, until one runs it; then that one;
   after vkp_loop_run returned, any ONE thread.
   Every pointer argument must be valid; NULL where it is not allowed gives INVALID.           */
