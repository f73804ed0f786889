#!/bin/sh
# Prints a line for each close, unref and deinit that the header declares, for tests/test_verbs.cpp:
# CLOSE(function, type), UNREF(function, type) or DEINIT(function, type). verbs.sh ROOT
set -eu
sed -e '/^#endif \/\* VALKEY_PUSH_H/,$d' "$1/valkey_push.h" | sed -n \
    -e 's/^VKP_API void \(vkp_[a-z_]*_close\)(\(vkp_[a-z_]*\) \*.*/CLOSE(\1, \2)/p' \
    -e 's/^VKP_API void \(vkp_[a-z_]*_unref\)(\(vkp_[a-z_]*\) \*.*/UNREF(\1, \2)/p' \
    -e 's/^VKP_API void \(vkp_[a-z_]*_deinit\)(\(vkp_[a-z_]*\) \*.*/DEINIT(\1, \2)/p'
