# compile.<compiler>.<dialect>: run.sh in one dialect with a compiler of the matrix that is here; a
# compiler that is not here leaves a single test, which says so. The option says what is done:
#   -O2            compiled, linked and run; -O2 shows further warnings, and gives the figures
#   -O0            compiled, linked and run
#   -fsyntax-only  every unit without a warning
# For a change: the first and the last dialects of C and C++ in full with the system's gcc and
# clang, and by -fsyntax-only what lies between them and what the other compilers say. With
# VKP_NIGHTLY everything is compiled, linked and run.
# units.<processor>: the suite's programs for other processors.
# compile.lto.<compiler>: programs linked with -flto. For a change: values of many sizes, and the
# examples that hand the most kinds of values around, by gcc, which sees the most. With VKP_NIGHTLY
# all examples, and clang.
set(c_dialects c99 c11 c17 c2x)
set(cxx_dialects c++11 c++14 c++17 c++20 c++2b)

function(add_compile_test name compiler dialect option)
  set(environment ${ARGN} "OPTIMISE=${option}")
  if(VKP_NIGHTLY AND dialect MATCHES "^c(99|\\+\\+11)$")
    set(environment ${ARGN} "OPTIMISE=-O2")
  elseif(VKP_NIGHTLY)
    set(environment ${ARGN} "OPTIMISE=-O0")
  endif()
  set(test compile.${name}.${dialect})
  add_test(NAME ${test} COMMAND sh ${CMAKE_CURRENT_SOURCE_DIR}/compile/run.sh ${compiler}
                                ${dialect} ${root} ${CMAKE_CURRENT_BINARY_DIR}/compile/${test})
  set_tests_properties(${test} PROPERTIES LABELS compile TIMEOUT 600 SKIP_RETURN_CODE 77
                                          ENVIRONMENT "${environment}")
  if(option STREQUAL "-O2")
    set_tests_properties(${test} PROPERTIES COST 20)
  endif()
endfunction()

function(add_compiler name name_cxx)
  find_program(VKP_COMPILE_${name} NAMES ${name})
  find_program(VKP_COMPILE_${name_cxx} NAMES ${name_cxx})
  mark_as_advanced(VKP_COMPILE_${name} VKP_COMPILE_${name_cxx})
  if(NOT VKP_COMPILE_${name})
    add_compile_test(${name} ${name} c99 -fsyntax-only)
    return()
  endif()
  # A name may stand for a compiler that was met already: gcc for clang on macOS, gcc-12 for gcc.
  execute_process(COMMAND ${VKP_COMPILE_${name}} --version OUTPUT_VARIABLE about ERROR_QUIET)
  string(REGEX REPLACE "\n.*" "" about "${about}")
  string(REGEX REPLACE "^[^ ]*gcc[^ ]* " "gcc " about "${about}")
  if(name STREQUAL "gcc" AND about MATCHES "clang" OR about IN_LIST compilers)
    return()
  endif()
  list(LENGTH compilers before)
  set(compilers ${compilers} ${about} PARENT_SCOPE)
  set(dialects ${c_dialects})
  if(VKP_COMPILE_${name_cxx})
    list(APPEND dialects ${cxx_dialects})
  endif()
  foreach(dialect IN LISTS dialects)
    set(option -fsyntax-only)
    if(before EQUAL 0 AND dialect STREQUAL "c99")
      set(option -O2)
    elseif(name MATCHES "^(gcc|clang)$" AND dialect MATCHES "^c(99|2x|\\+\\+11|\\+\\+2b)$")
      set(option -O0)
    endif()
    set(driver ${VKP_COMPILE_${name}})
    if(dialect MATCHES "\\+\\+")
      set(driver ${VKP_COMPILE_${name_cxx}})
    endif()
    add_compile_test(${name} ${driver} ${dialect} ${option})
  endforeach()
endfunction()

set(compilers)
add_compiler(gcc g++)
add_compiler(clang clang++)
if(NOT compilers)
  message(FATAL_ERROR "compile tests: neither gcc nor clang was found")
endif()
if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
  if(NOT VKP_NIGHTLY)
    set(c_dialects c99 c2x)
    set(cxx_dialects c++11 c++2b)
  endif()
  foreach(version IN ITEMS gcc-12 clang-14 clang-16 clang-19)
    string(REPLACE "gcc" "g++" version_cxx ${version})
    string(REPLACE "clang" "clang++" version_cxx ${version_cxx})
    add_compiler(${version} ${version_cxx})
  endforeach()

  # Another libc, for which there is no C++ library here.
  add_compile_test(musl-gcc musl-gcc c99 -O0)
  add_compile_test(musl-gcc musl-gcc c2x -fsyntax-only)

  # Other processors: two dialects on each, on i686 also times of 64 bits, with which system calls
  # of 32 bits must not meet, and programs of the suite that start neither the relay nor a server.
  # s390x is big endian: for a change it runs. i686 has sizes of 32 bits and doubles of 80: for a
  # change the compile test runs there. aarch64 and riscv64 have sizes and byte order of x86_64.
  # With VKP_NIGHTLY all four run.
  set(every_unit
      base bytes mpsc oneshot resp_reader corpus.resp broadcast watch cancel select loop
      resp_writer hub conn client backend_conformance kqueue glob typed mpsc_api oneshot_api
      linearizability support push_loop socket socket_edges listen listener gate health relay)
  set(s390x_units bytes resp_reader corpus.resp)
  foreach(target IN ITEMS "i686;qemu-i386" "s390x;qemu-s390x" "aarch64;qemu-aarch64"
                          "riscv64;qemu-riscv64")
    list(GET target 0 processor)
    list(GET target 1 emulator)
    set(prefix ${processor}-linux-gnu)
    set(environment "EMULATOR=${emulator}" "FLAGS=-static")
    set(units ${${processor}_units})
    set(option -fsyntax-only)
    if(processor MATCHES "^(i686|s390x)$")
      set(option -O0)
    endif()
    add_compile_test(${processor} ${prefix}-gcc c99 ${option} ${environment})
    add_compile_test(${processor} ${prefix}-g++ c++17 -fsyntax-only ${environment})
    if(VKP_NIGHTLY)
      set(units ${every_unit})
    elseif(NOT units)
      continue()
    endif()
    add_test(NAME units.${processor}
             COMMAND sh ${CMAKE_CURRENT_SOURCE_DIR}/compile/units.sh ${prefix} ${emulator} ${root}
                     ${CMAKE_CURRENT_BINARY_DIR}/compile/units.${processor} ${units})
    set_tests_properties(units.${processor} PROPERTIES LABELS compile TIMEOUT 1800 COST 100
                                                       SKIP_RETURN_CODE 77)
  endforeach()
  add_compile_test(i686-time64 i686-linux-gnu-gcc c99 -O0 "EMULATOR=qemu-i386"
                   "FLAGS=-static -D_TIME_BITS=64 -D_FILE_OFFSET_BITS=64")
endif()

set(examples commands demo_client test_with_null_backend)
set(names gcc)
if(VKP_NIGHTLY)
  set(examples)
  set(names gcc clang)
endif()
foreach(name IN LISTS names)
  add_test(NAME compile.lto.${name}
           COMMAND sh ${CMAKE_CURRENT_SOURCE_DIR}/compile/lto.sh ${name} ${root}
                   ${CMAKE_CURRENT_BINARY_DIR}/compile/lto.${name} ${examples})
  set_tests_properties(compile.lto.${name} PROPERTIES LABELS compile TIMEOUT 600
                                                      SKIP_RETURN_CODE 77)
endforeach()

# compile.macos.<architecture>: compiled and linked on any machine that has the cross compiler. For
# a change: the library, its backends and the examples, for one architecture. With VKP_NIGHTLY: the
# suites too, for which the cross compiler builds a C++ library first, and both architectures.
find_program(VKP_ZIG NAMES zig)
set(architectures aarch64)
set(environment "ZIG=${VKP_ZIG}" "SUITES=none")
if(VKP_NIGHTLY)
  set(architectures aarch64 x86_64)
  set(environment "ZIG=${VKP_ZIG}")
endif()
foreach(architecture IN LISTS architectures)
  set(test compile.macos.${architecture})
  add_test(NAME ${test} COMMAND sh ${CMAKE_CURRENT_SOURCE_DIR}/compile/macos.sh ${architecture}
                                ${root} ${CMAKE_CURRENT_BINARY_DIR}/${test})
  set_tests_properties(${test} PROPERTIES LABELS compile TIMEOUT 1800 COST 100 SKIP_RETURN_CODE 77
                                          ENVIRONMENT "${environment}")
endforeach()
