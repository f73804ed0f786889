# Faults in the text of >>impl-socket that the models of sockets have to notice; read by run.sh.
# shellcheck shell=sh

seed lingering 'the cleanup is taken in a step of its own' '
    /^VKP_API void vkp_socket_unref/,/^}/{
        s/^        less = (word & VKP_I_REFS) > 1 ? .*/        less = word - 1;/
        s/ || (word & VKP_I_CLEANUP) != 0)/ ||\
            (VKP_I_OR(\&sock->word, VKP_I_CLEANUP) \& VKP_I_CLEANUP) != 0)/
    }'

seed lingering 'nobody has the cleanup' '
    s/^        less = (word & VKP_I_REFS) > 1 ? .*/        less = word - 1;/'

seed lingering 'the disposal does not give the cleanup back' '
    s/} while (!VKP_I_CAS(&sock->word, &word, word & ~VKP_I_CLEANUP));/} while (0);/'

seed 'socket ' 'generations are not compared' '
    s/if (VKP_I_GENERATION(word) != generation || /(void)generation; if (/'

seed 'socket ' 'a slot is used again in the same generation' '
    /^static void vkp_i_socket_recycle/,/^}/{
        s/(VKP_I_LOAD(&sock->word)) + 1;/(VKP_I_LOAD(\&sock->word));/
        s/if (generation != 0)/if (true)/
    }'

seed 'socket ' 'a socket whose count is 0 is taken' '
    s/((word & VKP_I_REFS) == 0 && !(locked && registry->config.linger_ms > 0))/false/'

seed 'socket ' 'a dead socket is taken' '
    s/ || (word & VKP_I_DEAD) != 0 ||$/ ||/'

seed ', stop' 'the holder does not check for ended slots after its release' '
    s/} while (VKP_I_LOAD_ACQ(&registry->ended_slots) != NULL && .*/} while (0);/'

seed 'socket ' 'the disposal does not try again' '
    /^VKP_API void vkp_socket_unref/,/^}/{
        s/^        if (vkp_i_registry_try_enter(registry)) {/        if (0) {/
    }'

seed ', stop' 'the last unref waits' '
    /^VKP_API void vkp_socket_unref/,/^}/{
        s/^    if (vkp_i_registry_try_e.*/    vkp_i_latch_lock(\&registry->held, registry->sys); {/
        s/^    } else {/    } if (0) {/
    }'

seed ', orphan' 'the last unref does not keep the registry' '
    /^VKP_API void vkp_socket_unref/,/^}/{
        /VKP_I_ADD(&registry->refs, 1)/d
        /vkp_i_registry_drop(registry, 1)/d
    }'

seed 'socket ' 'the path is compared before there is a reference' '
    /^static vkp_socket \*vkp_i_registry_peek/,/^}/{
        s/if (vkp_i_socket_take(/if (!vkp_i_str_equal(sock->node.key, name) || vkp_i_socket_take(/
        s/if (vkp_i_str_equal(.*/if (true) {/
    }'

seed 'socket ' 'the file is not compared' '
    s/if (result == 0 && vkp_i_same_file(&found, id)) {/if ((void)id, result == 0) {/'

seed 'socket ' 'a socket is ended twice' '
    s/if ((VKP_I_OR(&sock->word, VKP_I_DEAD) & VKP_I_DEAD) != 0)/if (\
        VKP_I_OR(\&sock->word, VKP_I_DEAD) == 0)/'

seed 'socket ' 'who finds a dying socket takes its slot, too' '
    s/(void)vkp_i_socket_retire(sock, reg.*/vkp_i_socket_end(registry, sock, 0);/'

seed 'socket ' 'the lock file goes first' '
    /^static bool vkp_i_socket_retire/,/^}/{
        /^    vkp_i_socket_unlock(sock, ours);/d
        s/^    uint64_t now;/    uint64_t now = 0; vkp_i_socket_unlock(sock, ours);/
    }'

seed lingering 'who comes back still lingers' '
    s/^        sock->flags &= ~VKP_I_SOCKET_LINGERS;/        (void)0;/'

seed ', full' 'the count runs over into the bits above it' '
    s/^#define VKP_I_MOST_REFS .*/#define VKP_I_MOST_REFS VKP_I_REFS/'
