/* ======================================================================================
   >>impl-select   Wait for whichever comes first
   ======================================================================================
   The engine of select is vkp_i_select in the section park: every wait of the library, except
   plain sends and reserves of mpsc channels, is a select. This section has the public calls. It
   has no state and no lock: a select joins the objects of its cases one after the other and holds
   no lock of one object while it takes that of another.                                        */

/* i_object is set when the wait begins (vkp_i_sleeper_init). */
VKP_API vkp_case vkp_case_deadline(uint64_t deadline_ns)
{
    vkp_case each = vkp_i_case(&vkp_i_case_kind_deadline, NULL, NULL);
    each.i_number = deadline_ns;
    return each;
}

#if VKP_I_IO
VKP_API vkp_case vkp_case_fd(int fd, uint32_t interest)
{
    vkp_case each;
    if (fd < 0) {
        return vkp_case_never();
    }
    each = vkp_i_case(&vkp_i_case_kind_fd, NULL, NULL);
    each.i_number = (uint64_t)interest << 32 | (uint32_t)fd;
    return each;
}
#endif

/* A select pauses vkp_env.spins / this times before it sleeps: each time it tries all cases. */
#define VKP_I_SELECT_SPINS 8u

/* Select with the env of the first case that has an env, or with the default env. */
static vkp_status vkp_i_select_all(vkp_case *cases, size_t count, size_t start,
                                   uint64_t deadline_ns, size_t *won)
{
    vkp_i_wait waits[VKP_SELECT_MAX];
    const vkp_env *env = NULL;
    size_t i;
    for (i = 0; i < count && env == NULL; i++) {
        env = cases[i].i_kind->env(&cases[i]);
    }
    env = vkp_i_env(env);
    return vkp_i_select(cases, count, start, waits, vkp_i_sys(env),
                        vkp_i_spins(env) / VKP_I_SELECT_SPINS, deadline_ns, won);
}

VKP_API vkp_status vkp_select(vkp_case *cases, size_t count, uint64_t deadline_ns, size_t *won)
{
    VKP_I_REQUIRE(cases != NULL && count > 0 && count <= VKP_SELECT_MAX && won != NULL);
    return vkp_i_select_all(cases, count, 0, deadline_ns, won);
}

VKP_API vkp_status vkp_select_fair(vkp_case *cases, size_t count, uint32_t *turn,
                                   uint64_t deadline_ns, size_t *won)
{
    vkp_status status;
    VKP_I_REQUIRE(cases != NULL && count > 0 && count <= VKP_SELECT_MAX && won != NULL);
    VKP_I_REQUIRE(turn != NULL);
    status = vkp_i_select_all(cases, count, *turn % count, deadline_ns, won);
    if (status == VKP_OK) {
        *turn = (uint32_t)(*won + 1);
    }
    return status;
}
