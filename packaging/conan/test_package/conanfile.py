# The same program from outside the tree that the tests build for find_package.
import os

from conan import ConanFile
from conan.tools.build import can_run
from conan.tools.cmake import CMake, cmake_layout


class ValkeyPushConsumer(ConanFile):
    settings = "os", "arch", "compiler", "build_type"
    generators = "CMakeDeps", "CMakeToolchain"

    def requirements(self):
        self.requires(self.tested_reference_str)

    def layout(self):
        cmake_layout(self)

    def build(self):
        cmake = CMake(self)
        cmake.configure(variables={"VKP_CONSUMER": "find_package"},
                        build_script_folder=os.path.join("..", "..", "..", "tests", "packaging",
                                                         "consumer"))
        cmake.build()

    def test(self):
        if can_run(self):
            for program in ("library_c", "library_cpp", "header_c", "header_cpp"):
                self.run(os.path.join(self.cpp.build.bindir, program), env="conanrun")
