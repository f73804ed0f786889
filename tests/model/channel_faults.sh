# Faults in the text of the channels that their models have to notice; read by run.sh.
# shellcheck shell=sh

seed mpsc-lanes-spins 'a receiver that is awake passes aborted places' '
    /^static inline bool vkp_i_channel_looks_ready/,/^}/{
        s/vkp_i_lane_looks_ready(lane)/vkp_i_lane_oldest(lane) != NULL/
    }' header

seed mpsc-lanes 'peek lets no sender in' '
    /^VKP_API vkp_status vkp_mpsc_peek/,/^}/{
        /vkp_i_channel_tidy/d
    }' header

seed mpsc-grow 'a ring is freed under a running drop' '
    /^static inline uint8_t \*vkp_i_lane_oldest/,/^}/{
        s/(VKP_I_LOAD(&channel->flags) & VKP_I_RX_GONE) != 0/false/
    }' header

seed 'mpsc e ' 'a sender that leaves lets nobody in' '
    /^static vkp_status vkp_i_lane_leave/,/^}/{
        /vkp_i_lane_admit/d
    }' header

seed select-leaves 'a select that leaves lets nobody in' '
    /^static vkp_status vkp_i_lane_leave/,/^}/{
        /vkp_i_lane_admit/d
    }' header

seed mpsc-trim 'a ring is freed under a permit' '
    /^static void vkp_i_lane_trim/,/^}/{
        s/ && ticket == VKP_I_LOAD(&lane->head)//
    }
    /^static void vkp_i_lane_shrink/,/^}/{
        s/VKP_I_LOAD_ACQ(&lane->tail) >> 1 != head/false/
    }' header

seed mpsc-lanes 'a lane is freed with its values' '
    /^static bool vkp_i_lane_is_over/,/^}/{
        s/return VKP_I_LOAD_ACQ(&lane->dead) != 0.*/return VKP_I_LOAD_ACQ(\&lane->dead) != 0;/
        /VKP_I_LOAD(&lane->tail)/d
    }' header

seed mpsc-lanes 'a lane is freed before its sender' '
    /^static bool vkp_i_lane_is_over/,/^}/{
        s/VKP_I_LOAD_ACQ(&lane->dead) != 0/lane != \&lane->channel->lane/
    }' header

seed mpsc-lanes 'a lane is never linked' '
    /^static void vkp_i_lane_link/,/^}/{
        s/!lane->linked/lane == NULL/
    }' header

seed oneshot-beside 'the end of a slot wakes one side' '
    /^static inline bool vkp_i_oneshot_end/,/^}/{
        s/if (sender != NULL)/if (sender != NULL \&\& outcome == VKP_I_SLOT_CLOSED)/
    }' header
