#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* VKP_IMPLEMENTATION */
