#ifdef __cplusplus
extern "C" {
#endif

/* ======================================================================================
   >>api   Declarations
   ======================================================================================
   The contract above each function says who owns what (takes, borrows, shares, gives, views),
   whether the call may wait, from which threads it may be called, whether it is legal inside
   callbacks, and its errors with their causes. "Loop's thread" is the thread inside vkp_loop_run;
   before the first run, the thread that called vkp_loop_open; after run returned, any one thread.
   A pointer argument must be valid. Calls that return a status return INVALID for a NULL that their
   contract does not allow; getters and vkp_resp_put_ calls do not check.                        */
