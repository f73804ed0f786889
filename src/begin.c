/* ======================================================================================
   >>impl   Implementation
   ====================================================================================== */
#if defined(VKP_IMPLEMENTATION) && !defined(VKP_I_IMPLEMENTED)
#define VKP_I_IMPLEMENTED
