/* The other unit: what a program sees of the version. */
#include "valkey_push.h"

#include "unit.h"

#include <stdio.h>
#include <string.h>

int main(void)
{
    char version[32];
    vkp_bytes text = vkp_bytes_static(VKP_VERSION_STR, sizeof VKP_VERSION_STR - 1);
    vkp_str view = VKP_ZERO;
    view.ptr = vkp_version_str();
    view.len = text.len;
    snprintf(version, sizeof version, "%d.%d.%d", VKP_VERSION_MAJOR, VKP_VERSION_MINOR,
             VKP_VERSION_PATCH);
    if (strcmp(vkp_version_str(), version) != 0 || memcmp(text.data, version, text.len) != 0) {
        printf("version %.*s, macros %s\n", VKP_FMT(view), version);
        return 1;
    }
    return unit_runs();
}
