#ifdef __cplusplus
}
#endif

#endif /* VALKEY_PUSH_H */
