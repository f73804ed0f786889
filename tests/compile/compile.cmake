# compile.<compiler>.<dialect>: run.sh in every dialect with every compiler of the matrix that is
# here; one that is not leaves a single test, which says so. The oldest dialects are compiled with
# -O2, which shows further warnings and gives the figures; the others as fast as can be.
# units.<processor>: the suite's programs for other processors.
# All of that with VKP_MATRIX; without, what a change breaks most easily.
set(c_dialects c99 c11 c17 c2x)
set(cxx_dialects c++11 c++14 c++17 c++20 c++2b)

function(add_compile_test name compiler dialect)
  set(environment ${ARGN})
  if(dialect MATCHES "^c(99|\\+\\+11)$")
    list(APPEND environment "OPTIMISE=-O2")
  else()
    list(APPEND environment "OPTIMISE=-O0")
  endif()
  set(test compile.${name}.${dialect})
  add_test(NAME ${test} COMMAND sh ${CMAKE_CURRENT_SOURCE_DIR}/compile/run.sh ${compiler}
                                ${dialect} ${root} ${CMAKE_CURRENT_BINARY_DIR}/compile/${test})
  set_tests_properties(${test} PROPERTIES LABELS compile TIMEOUT 600 SKIP_RETURN_CODE 77
                                          ENVIRONMENT "${environment}")
endfunction()

function(add_compiler name name_cxx)
  find_program(VKP_COMPILE_${name} NAMES ${name})
  find_program(VKP_COMPILE_${name_cxx} NAMES ${name_cxx})
  mark_as_advanced(VKP_COMPILE_${name} VKP_COMPILE_${name_cxx})
  if(NOT VKP_COMPILE_${name})
    add_compile_test(${name} ${name} c99)
    return()
  endif()
  # A name may stand for a compiler that was met already: gcc for clang on macOS, gcc-12 for gcc.
  execute_process(COMMAND ${VKP_COMPILE_${name}} --version OUTPUT_VARIABLE about ERROR_QUIET)
  string(REGEX REPLACE "\n.*" "" about "${about}")
  string(REGEX REPLACE "^[^ ]*gcc[^ ]* " "gcc " about "${about}")
  if(name STREQUAL "gcc" AND about MATCHES "clang" OR about IN_LIST compilers)
    return()
  endif()
  set(compilers ${compilers} ${about} PARENT_SCOPE)
  foreach(dialect IN LISTS c_dialects)
    add_compile_test(${name} ${VKP_COMPILE_${name}} ${dialect})
  endforeach()
  if(VKP_COMPILE_${name_cxx})
    foreach(dialect IN LISTS cxx_dialects)
      add_compile_test(${name} ${VKP_COMPILE_${name_cxx}} ${dialect})
    endforeach()
  endif()
endfunction()

set(compilers)
add_compiler(gcc g++)
add_compiler(clang clang++)
if(NOT compilers)
  message(FATAL_ERROR "compile tests: neither gcc nor clang was found")
endif()
if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
  if(NOT VKP_MATRIX)
    set(c_dialects c99 c2x)
    set(cxx_dialects c++11 c++2b)
  endif()
  foreach(version IN ITEMS gcc-12 clang-14 clang-16 clang-19)
    string(REPLACE "gcc" "g++" version_cxx ${version})
    string(REPLACE "clang" "clang++" version_cxx ${version_cxx})
    add_compiler(${version} ${version_cxx})
  endforeach()

  # Another libc, for which there is no C++ library here.
  add_compile_test(musl-gcc musl-gcc c99)
  add_compile_test(musl-gcc musl-gcc c2x)

  # Other processors: two dialects on each, on i686 also times of 64 bits, with which system calls
  # of 32 bits must not meet, and all programs of the suite that start neither the relay nor a
  # server. s390x is big endian, i686 has sizes of 32 bits and doubles of 80.
  set(units base bytes mpsc oneshot resp_reader corpus.resp)
  if(VKP_MATRIX)
    list(APPEND units
         broadcast watch cancel select loop resp_writer hub conn client backend_conformance kqueue
         glob typed mpsc_api oneshot_api linearizability support push_loop socket socket_edges
         listen listener gate health relay)
  endif()
  foreach(target IN ITEMS "i686;qemu-i386" "s390x;qemu-s390x" "aarch64;qemu-aarch64"
                          "riscv64;qemu-riscv64")
    list(GET target 0 processor)
    list(GET target 1 emulator)
    set(prefix ${processor}-linux-gnu)
    set(environment "EMULATOR=${emulator}" "FLAGS=-static")
    add_compile_test(${processor} ${prefix}-gcc c99 ${environment})
    add_compile_test(${processor} ${prefix}-g++ c++17 ${environment})
    add_test(NAME units.${processor}
             COMMAND sh ${CMAKE_CURRENT_SOURCE_DIR}/compile/units.sh ${prefix} ${emulator} ${root}
                     ${CMAKE_CURRENT_BINARY_DIR}/compile/units.${processor} ${units})
    set_tests_properties(units.${processor} PROPERTIES LABELS compile TIMEOUT 900
                                                       SKIP_RETURN_CODE 77)
  endforeach()
  add_compile_test(i686-time64 i686-linux-gnu-gcc c99 "EMULATOR=qemu-i386"
                   "FLAGS=-static -D_TIME_BITS=64 -D_FILE_OFFSET_BITS=64")
endif()

# compile.macos.<architecture>: compiled and linked on any machine that has the cross compiler.
find_program(VKP_ZIG NAMES zig)
foreach(architecture IN ITEMS aarch64 x86_64)
  set(test compile.macos.${architecture})
  set(environment "ZIG=${VKP_ZIG}")
  if(NOT VKP_MATRIX AND architecture STREQUAL "aarch64")
    list(APPEND environment
         "SUITES=backend_conformance test_kqueue test_loop test_conn test_socket test_client")
  elseif(NOT VKP_MATRIX)
    list(APPEND environment "SUITES=none")
  endif()
  add_test(NAME ${test} COMMAND sh ${CMAKE_CURRENT_SOURCE_DIR}/compile/macos.sh ${architecture}
                                ${root} ${CMAKE_CURRENT_BINARY_DIR}/${test})
  set_tests_properties(${test} PROPERTIES LABELS compile TIMEOUT 1200 SKIP_RETURN_CODE 77
                                          ENVIRONMENT "${environment}")
endforeach()
