#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-resolver   Names without blocking
   A lookup of a host name blocks: for seconds where the name server does not answer. A resolver
   does lookups in a thread of the program, for all clients that share it. */

/* Open a resolver. NULL env: all defaults.
   Owns:   gives *resolver     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (resolver NULL) */
VKP_API VKP_NODISCARD vkp_status vkp_resolver_open(const vkp_env *env, vkp_resolver **resolver);

/* Look names up until vkp_resolver_close: the body of a thread. Several threads may run at once:
   then a name that takes long delays no other. Hold a reference meanwhile. To end a program, do not
   wait for this thread: a lookup cannot be interrupted.
   Blocks: on DNS, and between lookups     Threads: any     In callbacks: no */
VKP_API void vkp_resolver_run(vkp_resolver *resolver);

/* End vkp_resolver_run, after its current lookup; lookups that wait, and later ones, fail.
   Idempotent; NULL is ignored. Any thread. */
VKP_API void vkp_resolver_close(vkp_resolver *resolver);

/* One more reference to the resolver (gives). Any thread. */
VKP_API vkp_resolver *vkp_resolver_ref(vkp_resolver *resolver);

/* Give a reference back; the last one closes and frees. Clients hold references of their own. NULL
   is ignored. Any thread. */
VKP_API void vkp_resolver_unref(vkp_resolver *resolver);

#endif /* VKP_NO_IO */
