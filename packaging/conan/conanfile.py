# Conan 2: conan create packaging/conan
import os
import re

from conan import ConanFile
from conan.errors import ConanInvalidConfiguration
from conan.tools.cmake import CMake, CMakeDeps, CMakeToolchain, cmake_layout
from conan.tools.files import copy, load, rmdir, save


class ValkeyPush(ConanFile):
    name = "valkey_push"
    license = "MIT"
    description = "Server pushes for C in one header: channels, an event loop, a Valkey client"
    topics = ("valkey", "redis", "pubsub", "channels", "header-only")
    package_type = "static-library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"fPIC": [True, False], "relay": [True, False]}
    default_options = {"fPIC": True, "relay": False}

    _backends_module = os.path.join("lib", "valkey_push-backends.cmake")

    def _tree(self):
        return os.path.join(self.recipe_folder, "..", "..")

    def set_version(self):
        header = load(self, os.path.join(self._tree(), "valkey_push.h"))
        self.version = re.search(r'#define VKP_VERSION_STR "(.+)"', header).group(1)

    def export_sources(self):
        for pattern in ("valkey_push.h", "CMakeLists.txt", "LICENSE", "CHANGELOG.md", "backends/*",
                        "examples/*", "packaging/*"):
            copy(self, pattern, self._tree(), self.export_sources_folder)

    def validate(self):
        if self.settings.os == "Windows":
            raise ConanInvalidConfiguration("valkey_push needs POSIX")

    def configure(self):
        self.settings.rm_safe("compiler.cppstd")
        self.settings.rm_safe("compiler.libcxx")

    def layout(self):
        cmake_layout(self)

    def generate(self):
        toolchain = CMakeToolchain(self)
        toolchain.cache_variables["VKP_EXAMPLES"] = bool(self.options.relay)
        toolchain.cache_variables["VKP_TESTS"] = "OFF"
        toolchain.cache_variables["VKP_INSTALL"] = True
        toolchain.generate()
        CMakeDeps(self).generate()

    def build(self):
        cmake = CMake(self)
        cmake.configure()
        cmake.build()

    def package(self):
        copy(self, "LICENSE", self.source_folder, os.path.join(self.package_folder, "licenses"))
        CMake(self).install()
        # Conan writes these for its consumers, from package_info; all but the backends' folder.
        rmdir(self, os.path.join(self.package_folder, "lib", "cmake"))
        rmdir(self, os.path.join(self.package_folder, "lib", "pkgconfig"))
        save(self, os.path.join(self.package_folder, self._backends_module),
             'set(valkey_push_BACKENDS_DIR\n'
             '    "${CMAKE_CURRENT_LIST_DIR}/../share/valkey_push/backends")\n')

    def package_info(self):
        self.cpp_info.set_property("cmake_file_name", "valkey_push")
        self.cpp_info.set_property("cmake_build_modules", [self._backends_module])
        header = self.cpp_info.components["header"]
        header.set_property("cmake_target_name", "valkey_push::header")
        header.set_property("pkg_config_name", "valkey_push")
        header.libdirs = []
        if self.settings.os in ("Linux", "FreeBSD"):
            header.system_libs = ["pthread"]
        impl = self.cpp_info.components["impl"]
        apple = self.settings.os == "Macos"
        impl.exelinkflags = ["-Wl,-dead_strip" if apple else "-Wl,--gc-sections"]
        impl.set_property("cmake_target_name", "valkey_push::impl")
        impl.set_property("pkg_config_name", "valkey_push_impl")
        impl.libs = ["valkey_push"]
        impl.requires = ["header"]
