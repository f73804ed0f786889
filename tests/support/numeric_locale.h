/* A numeric locale for a test of text that must not depend on it.
   SPDX-License-Identifier: MIT                                                                  */
#ifndef VKP_TEST_NUMERIC_LOCALE_H
#define VKP_TEST_NUMERIC_LOCALE_H

#include <clocale>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <sys/stat.h>
#include <unistd.h>

#include "support/support.h"

// A numeric locale with the given decimal point: an installed one, or, where the C library reads
// its locales from files of a known form, one made for the test.
class NumericLocale {
  public:
    NumericLocale(const std::string &point, uint32_t code, const std::vector<const char *> &names)
    {
        const char *now = std::setlocale(LC_NUMERIC, nullptr);
        before_ = now ? now : "C";
        for (const char *name : names) {
            if (std::setlocale(LC_NUMERIC, name) != nullptr &&
                point == localeconv()->decimal_point) {
                active = true;
                return;
            }
        }
#if defined(__GLIBC__)
        const std::string folder = vkp_test_path("locales");
        const std::string name = "vkp_" + std::to_string(code);
        if (write_file(folder, name, point, code)) {
            (void)setenv("LOCPATH", folder.c_str(), 1);
            active = std::setlocale(LC_NUMERIC, name.c_str()) != nullptr &&
                     point == localeconv()->decimal_point;
            (void)unsetenv("LOCPATH");
        }
#else
        (void)code;
#endif
    }
    ~NumericLocale()
    {
        (void)std::setlocale(LC_NUMERIC, before_.c_str());
#if defined(__GLIBC__)
        if (!file_.empty()) {
            (void)unlink(file_.c_str());
            (void)rmdir(file_.substr(0, file_.rfind('/')).c_str());
            (void)rmdir(vkp_test_path("locales"));
        }
#endif
    }
    NumericLocale(const NumericLocale &) = delete;
    NumericLocale &operator=(const NumericLocale &) = delete;
    bool active = false;

  private:
    std::string before_;
#if defined(__GLIBC__)
    std::string file_;

    static void put_u32(std::string &out, uint32_t number)
    {
        out.append(reinterpret_cast<const char *>(&number), sizeof number);
    }

    // The category file: magic, count and offsets of six members, then the members.
    bool write_file(const std::string &folder, const std::string &name, const std::string &point,
                    uint32_t code)
    {
        std::string members = point + '\0' + '\0' + '\0'; // point, no separator, no grouping
        const uint32_t separator = static_cast<uint32_t>(point.size()) + 1;
        while (members.size() % 4 != 0) {
            members += '\0';
        }
        const uint32_t wide = static_cast<uint32_t>(members.size());
        put_u32(members, code);
        put_u32(members, 0);
        members += std::string("UTF-8") + '\0';
        std::string file;
        put_u32(file, 0x20031114u);
        put_u32(file, 6);
        for (uint32_t offset : {0u, separator, separator + 1, wide, wide + 4, wide + 8}) {
            put_u32(file, 32 + offset);
        }
        file += members;
        (void)mkdir(folder.c_str(), 0700);
        (void)mkdir((folder + "/" + name).c_str(), 0700);
        file_ = folder + "/" + name + "/LC_NUMERIC";
        std::FILE *out = std::fopen(file_.c_str(), "wb");
        if (out == nullptr) {
            return false;
        }
        const bool written = std::fwrite(file.data(), 1, file.size(), out) == file.size();
        return std::fclose(out) == 0 && written;
    }
#endif
};

#endif /* VKP_TEST_NUMERIC_LOCALE_H */
