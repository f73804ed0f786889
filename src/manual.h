/* ======================================================================================
   >>manual   Concepts
   ======================================================================================
   What it is for. A Valkey (or Redis) server pushes: messages of subscribed channels, keys that
   were invalidated. This library carries those pushes to the code, thread or process that wants
   them, and holds what such a program is made of: channels between threads, one-shot replies,
   cancellation, an event loop over a backend, a RESP reader, ref-counted Unix sockets,
   connections with bounded queues, a hub of subscribers, a client that reconnects, a relay.

   The layers, lowest first; each uses only those above it in this list:
       base       statuses, deadlines, env: memory, log, and the operating system in one table
       bytes      immutable ref-counted blocks and slices of them
       mpsc, oneshot, broadcast, watch, cancel, select   what threads say to each other, and how
                  they wait; no I/O (VKP_NO_IO keeps these alone)
       loop       one thread's events: descriptors, timers, calls posted by other threads
       resp       incremental reader, writer
       socket     a listening Unix socket that lives as long as somebody refers to it
       conn       a connection on a loop: outbox, policies, one gathered write per round
       hub        who is subscribed to what: one frame in, one reference per subscriber out
       client     a server connection that many threads share
       push loop  from a channel of pushes to a hub, a connection or a callback
       relay      all of it as a server: local clients in front, one upstream connection behind

   A program of one thread opens a loop, a client on it, and runs:
       static void on_push(void *user, const vkp_push *push)
       {
           if (push->kind == VKP_PUSH_MESSAGE) {
               printf("%.*s\n", VKP_FMT(push->payload));
           }
       }
   Errors aside (examples/subscribe.c has them) the rest is four calls, shown at the top.
   A thread of its own takes the same pushes from a channel (vkp_client_config.pushes):
       while (vkp_mpsc_recv(rx, VKP_FOREVER, &push) == VKP_OK) {
           use(&push);
           vkp_push_unref(&push);
       }
   and asks from wherever it is, with a slot on its stack:
       vkp_oneshot slot; vkp_reply *reply;
       if (vkp_client_command(client, &slot, "INCR", "hits", NULL) == VKP_OK &&
           vkp_oneshot_recv(&slot, vkp_after_ms(250), &reply) == VKP_OK) {
           use(vkp_reply_get_value(reply));
           vkp_reply_unref(reply);
       }

   CHANNELS. mpsc: a queue with many senders and one receiver, bounded (senders wait:
   back-pressure) or not. oneshot: one value, once, in the caller's memory: the reply to a request.
   broadcast: each receiver sees each value, a slow one hears how many it lost. watch: only the
   newest value. cancel: a token that ends waits, with its children. Each end waits in three forms:
   try_x looks, x waits until a deadline, and a loop calls back (vkp_handler_open,
   vkp_mpsc_watch). vkp_select waits for several at once and carries out one:
       vkp_case cases[] = {vkp_case_cancel(stop), vkp_case_mpsc_recv(jobs, &job)};
       if (vkp_select(cases, 2, vkp_after_ms(1000), &won) == VKP_OK && won == 1) { work(&job); }
   A value that one end took is received once or dropped once, through `drop`, whoever goes first.
   A thread that has to wait looks for some microseconds before it sleeps (vkp_env.spins); the
   first sender after that wakes it, the others find it awake. Idle channels cost no processor.
   docs/tokio-to-c.md has each call of Tokio's channels beside ours.

   SOCKETS. A registry knows a program's listening Unix sockets by their paths and keeps none alive.
   Each handle is a reference: vkp_socket_open gives one to the live socket or binds a new
   one, in place of a file that a dead process left; the last vkp_socket_unref removes the file,
   from whichever thread, without waiting for others. A listener keeps its socket, or follows it
   (vkp_listener_config.follow): then clients keep it, each by its seat, and the last to leave turns
   off the light. A gate says who comes in (by default this process's own user), and how many.
   docs/sockets.md goes through a socket's life; examples/socket_life.c shows one.

   OWNERSHIP. Contracts use five words. takes: yours no more, unless the call fails (descriptors
   too). borrows: until the call returns. shares: the object takes a reference of its own. gives:
   one reference is yours to unref. views: valid until the next call that the contract names.
   open gives a handle; ref and unref count; close ends what the object does, once, from any
   thread, and frees nothing: the handle stays valid, and says CLOSED, until its last unref.
   unref(NULL) does nothing. Out-parameters are written only on OK.

   CONFIGS are structs: zero them (VKP_ZERO) and set what matters; every zero is a default. They
   are copied; pointers to ops tables, backends and env are kept and must outlive the object.

   THREADS. The library starts none and keeps no global state. A loop belongs to the thread inside
   vkp_loop_run; connections, listeners, hubs and watches belong to their loop's thread. Any
   thread may: use channels and tokens, post to a loop, push to a connection, close and unref
   connections and clients, send commands, subscribe. Until a thread runs the loop it belongs
   to the one that opened it, which sets everything up. For more cores run more loops; a
   connection stays on its loop for life.

   CALLBACKS run on the loop's thread, never under a lock; any call is legal inside one unless its
   contract says no. After an object's close returned on the loop's thread none of its callbacks
   runs. What is written during a round leaves at its end, one system call per connection.

   DEADLINES are absolute monotonic nanoseconds: vkp_after_ms(250), 0 (do not wait), VKP_FOREVER.

   ERRORS. Everything that can fail returns a vkp_status that the compiler makes you look at.
   Nothing prints, aborts or exits. A call that failed changed nothing, or says what it changed.
   SYS leaves the cause in errno. A programmer's error asserts (VKP_ASSERT) and is INVALID in
   release builds.
   Texts for people go to env.log.

   LIMITS. All queues are bounded in bytes by their configs, the reader in depth, elements, lines
   and bytes. One block, frame or command is below 4 GiB. Host names are resolved by getaddrinfo,
   which may block the loop's thread; addresses in digits never do.

   SIGNALS. Process-wide state is not touched; sends never raise SIGPIPE. vkp_loop_stop and
   vkp_registry_unlink_all may be called in a handler. FORK. A child may unref what it inherited,
   no more; it removes no files.
   SERVERS. RESP3 servers (Redis 6, Valkey) carry commands and pushes on one connection. On a RESP2
   server the client works too, but a connection with subscriptions takes no commands (REFUSED):
   open a second client.                                                                        */
