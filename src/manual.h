/* ======================================================================================
   >>manual   Concepts
   ======================================================================================
   START HERE
   - To react to what a server pushes: vkp_loop_open, vkp_client_open, vkp_client_subscribe,
     vkp_loop_run. Pushes arrive in on_push, or in a channel that a thread of yours receives from.
   - To send commands from any thread: vkp_client_command (or vkp_client_commandf, with a format as
     hiredis has it), and vkp_oneshot_recv for the reply.
   - To keep a cache: CLIENT TRACKING in vkp_client_config.setup, and vkp_push_get_key.
   - To pass values between threads: sections api-mpsc, api-oneshot, api-broadcast, api-watch.
   - To serve local clients: vkp_listener_open, or a whole relay with vkp_relay_open.
   - To run inside a loop that the program has already: docs/embedding.md.
   - To test code that uses this library: vkp_backend_null and docs/testing-your-code.md.
   - Every call has its contract above its declaration. docs/guarantees.md lists what holds always,
     docs/recipes/ has short whole programs.

   WHAT IT IS FOR. A Valkey (or Redis) server pushes: messages of subscribed pub/sub channels, keys
   that became invalid. This library carries those pushes to the callback, thread or process that
   needs them. It holds what such programs are made of: channels between threads, cancellation, an
   event loop over a backend, a RESP reader and writer, ref-counted Unix sockets, connections with
   bounded queues, a hub of subscribers, a client that reconnects, a relay.

   A program of one thread opens a loop, a client on it, and runs:
       static void on_push(void *user, const vkp_push *push)
       {
           if (push->kind == VKP_PUSH_MESSAGE) {
               printf("%.*s\n", VKP_FMT(push->payload));
           }
       }
   Errors aside (examples/subscribe.c has them) the other four calls are shown at the top.
   A thread of its own takes the same pushes from a channel (vkp_client_config.pushes):
       while (vkp_mpsc_recv(rx, VKP_FOREVER, &push) == VKP_OK) {
           use(&push);
           vkp_push_unref(&push);
       }
   Any thread sends commands, with a slot for the reply on its stack:
       vkp_oneshot slot; vkp_reply *reply;
       if (vkp_client_command(client, &slot, "INCR", "hits", NULL) == VKP_OK &&
           vkp_oneshot_recv(&slot, vkp_after_ms(250), &reply) == VKP_OK) {
           use(vkp_reply_get_value(reply));
           vkp_reply_unref(reply);
       }

   CHANNELS. mpsc: a queue with many senders and one receiver, bounded (a sender that finds it full
   waits: back-pressure) or not. oneshot: one value, once, in the caller's memory: the reply to a
   request. broadcast: each receiver gets each value; a slow receiver gets the number it lost.
   watch: only the newest value. cancel: a token that ends waits, with its children. Each end waits
   in three forms: try_x never waits, x waits until a deadline, and a loop calls a handler while x
   is ready (vkp_handler_open). vkp_select waits for several cases and carries out one:
       vkp_case cases[] = {vkp_case_cancel(stop), vkp_case_mpsc_recv(jobs, &job)};
       if (vkp_select(cases, 2, vkp_after_ms(1000), &won) == VKP_OK && won == 1) { work(&job); }
   Each value that a channel took is received once or dropped once, through the channel's drop
   function, whichever end closes first. A thread that waits checks for some microseconds before it
   sleeps (vkp_env.spins); the first sender after that wakes it. An idle channel costs nothing.
   docs/tokio-to-c.md has each call of Tokio's channels beside ours.

   SOCKETS. A registry finds a program's listening Unix sockets by their paths and keeps none of
   them open. Each handle is a reference: vkp_socket_open returns one to the live socket of a path
   or binds a new one, in place of a file that a dead process left. The last vkp_socket_unref
   removes the file, on whichever thread, without waiting for other threads. A listener holds a
   reference to its socket, or follows it (vkp_listener_config.follow): then each connected client
   holds a reference, and when the last one disconnects the socket is closed and its file removed.
   A gate says which clients are admitted (by default those of this process's own user) and how
   many. docs/sockets.md describes a socket's life case by case; examples/socket_life.c shows one.

   OWNERSHIP. Contracts use five words.
       takes     on OK the callee owns it; on any error the caller still does, descriptors included
       borrows   the callee uses it until the call returns
       shares    the object takes a reference of its own
       gives     one reference is the caller's to unref
       views     valid until the next call that the contract names
   Out-parameters are written only on OK.

   VERBS. The same for every handle:
       open      gives a handle, with one reference
       ref       gives one more reference to the same handle
       close     ends what the object does. Frees nothing: the handle stays valid until its last
                 unref, and calls on it return CLOSED. Idempotent; NULL is ignored.
       unref     gives one reference back. The last one closes the object first, then frees it. NULL
                 is ignored.
       init      prepares memory of the caller's; deinit ends it. deinit(NULL) does nothing.
   close and unref of each handle (thread: from where close, then unref, may be called):
       handle            close                                last unref            thread
       vkp_loop          closes all that is on it             closes                loop's; any
       vkp_client        commands get CLOSED, no callback     closes                any; any
       vkp_conn          calls on_close                       (the loop holds one)  any; any
       vkp_listener      accepts no new clients               closes, ends a drain  loop's; loop's
       vkp_health_check  no result follows                    closes                loop's; loop's
       vkp_http          closes its connections               closes, ends a drain  loop's; loop's
       vkp_resolver      run returns, lookups fail            closes                any; any
       vkp_handler       is not called again                  closes                loop's; loop's
       vkp_mpsc_rx       senders get CLOSED                   closes, drops values  any; receiver's
       vkp_oneshot       the sender gets CLOSED               rx closes, tx abandons   each side's
   Handles without close, where the last unref ends the activity: senders of channels (receivers
   drain, then get CLOSED), receivers of broadcast and watch, tokens, sockets (stop listening),
   seats, push loops, relays, readers. Plain references: registries, pools, gates, hubs, replies.

   ORDER OF ARGUMENTS. The object first, then what goes in, then a function and its user pointer,
   then the deadline, then out-parameters.

   CONFIGS are structs: zero them (VKP_ZERO) and set what matters. Every zero is a default that its
   field's comment names; VKP_UNLIMITED and VKP_OFF say what zero cannot. Where no field is
   required, a NULL config means all defaults. Configs are copied; pointers to ops tables, backends
   and env are kept and must outlive the object. Texts are vkp_str, copied where they are kept;
   vkp_str_of makes one of a C string, and a zeroed one is absent.

   THREADS. The library starts none and keeps no global state. A loop belongs to its thread ("loop's
   thread"): the thread inside vkp_loop_run; before the first run, the thread that called
   vkp_loop_open; after run returned, any one thread. Connections, listeners, hubs, handlers, timers
   and descriptors belong to their loop's thread. Any thread may use channels and tokens, post to a
   loop, push to a connection, close and unref connections and clients, send commands, subscribe. To
   use more cores run more loops; a connection stays on its loop for life.

   CALLBACKS run on the loop's thread, never under a lock; any call is legal inside one unless its
   contract says no. After an object's close returned on the loop's thread none of its callbacks
   runs. Frames that are queued during a round are written at its end, with one system call per
   connection.

   DEADLINES are absolute monotonic nanoseconds: vkp_after_ms(250), 0 (do not wait), VKP_FOREVER; on
   a loop vkp_loop_after_ms, which counts by the loop's own clock.

   ERRORS. Everything that can fail returns a vkp_status, which the compiler warns about if it is
   ignored ((void)!call(...) ignores one). Nothing prints, aborts or exits. A call that failed
   changed nothing, or its contract says what it changed. SYS leaves the cause in errno. A
   programmer's error is INVALID; a program that defines VKP_ASSERT asserts first. Texts for people
   go to env.log.

   LIMITS. All queues are bounded in bytes by their configs; the reader is bounded in depth,
   elements, lines and bytes. One block, frame or command is below 4 GiB. Host names are resolved
   by getaddrinfo, which may block the loop's thread; numeric addresses never block.

   SIGNALS. Process-wide signal state is not touched; sends never raise SIGPIPE. vkp_loop_stop and
   vkp_registry_unlink_all may be called in a signal handler. FORK. A child may only unref what it
   inherited; that removes no files.

   SERVERS. RESP3 servers (Redis 6, Valkey) carry commands and pushes on one connection. On a RESP2
   server the client works too, but a connection with subscriptions takes no commands (REFUSED):
   open a second client.

   GLOSSARY. One word has one meaning here, in the header, the documents and the messages.
       backend         what makes a loop wait: poll, epoll, kqueue; null has a virtual clock
       block           ref-counted immutable bytes; a vkp_bytes is a slice of one
       case            one thing to wait for: vkp_select, vkp_handler_open
       channel         between threads: mpsc, oneshot, broadcast, watch. A server's channel is a
                       pub/sub channel
       client          a vkp_client; of a listener, gate or relay: a program connected to it
       connection      a vkp_conn: a stream socket on a loop, with its queues
       drain           write what is queued, then close
       env             allocator, log function, system calls: vkp_env
       frame           one whole RESP value, as bytes
       gap             the time in which messages may have been lost: VKP_PUSH_GAP
       gate            admits clients, by user and number; each admitted client has a seat
       guest           a backend inside the program's own loop: libev, libuv, libevent
       handler         a function that a loop calls while a case is ready
       hub             which connections subscribed to what; one frame in, a reference to each out
       interest        one vkp_client_subscribe that was not taken back
       io              a descriptor that is registered on a loop
       lane            the queue of one sender of an mpsc channel
       linger          a socket's time between its last reference and its end
       listener        accepts clients on a loop
       loop, round     one thread's events; a round waits, calls callbacks, writes
       name            of a pub/sub channel, a pattern or a shard channel
       outage          from DISCONNECTED to RECONNECTED
       peer            the other end of a connection
       permit          a place in an mpsc channel whose value is being built
       policy          what a push does when the queue is full: vkp_on_full
       push            a frame that its receiver did not ask for: from a server (vkp_push), or from
                       this program to a peer (vkp_conn_push)
       push loop       carries pushes from a channel to a sink: a hub, a connection, a callback
       registry        finds live sockets by path
       relay           local clients share connections to a server (upstream), or none
       reply           what a server answered to a command
       select          wait for the first ready case. SELECT is a command of the server
       sender, receiver  the two ends of a channel: tx and rx
       slot            the memory of a one-shot
       subscription    a name and a subscriber; in a hub a subscriber is a member
       token           a cancellation token: vkp_cancel
       watch           the channel that holds the newest value. WATCH is a command of the server  */
