/* valkey_push.h - server pushes for C, in one header
   Made of the parts in src/ by src/amalgamate.sh: edit those. SPDX-License-Identifier: MIT

   Do this in ONE source file of the program, before its first #include:
       #define VKP_IMPLEMENTATION
       #include "valkey_push.h"
   and in every other one:
       #include "valkey_push.h"
   Build with one backend from backends/, and threads:
       cc app.c backends/vkp_backend_poll.c -lpthread

   A whole program (examples/subscribe.c prints what a server publishes):
       vkp_loop_open(&loop_config, &loop);                 (a loop over a backend)
       vkp_client_open(loop, &client_config, &client);     (on_push = your callback)
       vkp_client_subscribe(client, VKP_SUB_CHANNEL, vkp_str_of("news"));
       vkp_loop_run(loop);

   TABLE OF CONTENTS (search for the token)
       >>manual        concepts, ownership, threads, errors, limits
       >>config        macros that change the build
       >>api           declarations: what people come for first
           >>api-handles  >>api-base  >>api-bytes  >>api-value  >>api-push  >>api-client
           >>api-resolver  >>api-sync  >>api-loop  >>api-mpsc  >>api-oneshot  >>api-broadcast
           >>api-watch  >>api-cancel  >>api-select  >>api-handler  >>api-resp  >>api-registry
           >>api-socket  >>api-conn  >>api-gate  >>api-listener  >>api-health  >>api-http
           >>api-hub  >>api-pushloop  >>api-relay  >>api-sys  >>api-backend  >>api-typed
       >>impl          implementation: lowest layer first
           >>impl-base  >>impl-sys  >>impl-park  >>impl-bytes  >>impl-map  >>impl-cancel
           >>impl-mpsc  >>impl-mpsc-send  >>impl-mpsc-receive  >>impl-mpsc-ends  >>impl-oneshot
           >>impl-receivers  >>impl-broadcast  >>impl-watch  >>impl-select  >>impl-loop
           >>impl-handler  >>impl-loop-run  >>impl-value  >>impl-resp  >>impl-frame
           >>impl-resp-writer  >>impl-value-text  >>impl-format  >>impl-address  >>impl-socket
           >>impl-registry  >>impl-gate  >>impl-conn-queue  >>impl-conn  >>impl-listener
           >>impl-health  >>impl-http-read  >>impl-http  >>impl-hub  >>impl-push  >>impl-push-keys
           >>impl-command  >>impl-resolver  >>impl-link  >>impl-handshake  >>impl-link-connect
           >>impl-client  >>impl-client-subscriptions  >>impl-client-probe  >>impl-client-delivery
           >>impl-client-liveness  >>impl-client-private  >>impl-url  >>impl-client-connection
           >>impl-sync  >>impl-pushloop  >>impl-relay  >>impl-relay-subscribe  >>impl-relay-resp2
           >>impl-relay-identity  >>impl-relay-session  >>impl-relay-errand  >>impl-relay-door
           >>impl-relay-survey  >>impl-relay-commands  >>impl-relay-requests  >>impl-relay-serve
       >>licence       the licence in full
*/
