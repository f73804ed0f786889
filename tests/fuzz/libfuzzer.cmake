# fuzz.<name>: the target, the implementation and the backends, all instrumented by one clang
# whatever the compiler of the build is, run for VKP_FUZZ_SECONDS from fuzz/corpus/<name> with
# fuzz/<name>.dict. What libFuzzer finds on the way goes to the build folder.
find_program(VKP_FUZZ_CLANG NAMES clang)
set(probe ${CMAKE_CURRENT_BINARY_DIR}/fuzz_probe.c)
file(WRITE ${probe} "int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n);\n"
                    "int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n)\n"
                    "{ (void)d; (void)n; return 0; }\n")
set(fuzz_flags -std=c99 -g -O1 -fno-omit-frame-pointer -fno-sanitize-recover=all -pthread)
set(fuzz_works 1)
if(VKP_FUZZ_CLANG)
  execute_process(
    COMMAND ${VKP_FUZZ_CLANG} ${fuzz_flags} -fsanitize=fuzzer,address,undefined ${probe} -o
            ${CMAKE_CURRENT_BINARY_DIR}/fuzz_probe
    RESULT_VARIABLE fuzz_works OUTPUT_QUIET ERROR_QUIET)
endif()
if(NOT fuzz_works EQUAL 0)
  message(FATAL_ERROR "VKP_FUZZ needs a clang with libFuzzer (Debian: clang, libclang-rt-N-dev)")
endif()

set(fuzz_objects)
foreach(file IN ITEMS ${impl_file} ${backend_files})
  get_filename_component(name ${file} NAME_WE)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/fuzz_${name}.o)
  list(APPEND fuzz_objects ${object})
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${VKP_FUZZ_CLANG} ${fuzz_flags} -fsanitize=fuzzer-no-link,address,undefined -I${root}
            -c ${file} -o ${object}
    DEPENDS ${file} ${root}/valkey_push.h VERBATIM)
endforeach()
# An archive, so that a target may also hold the implementation itself.
set(fuzz_archive ${CMAKE_CURRENT_BINARY_DIR}/libvkp_fuzz.a)
add_custom_command(
  OUTPUT ${fuzz_archive}
  COMMAND ${CMAKE_COMMAND} -E remove -f ${fuzz_archive}
  COMMAND ${CMAKE_AR} crs ${fuzz_archive} ${fuzz_objects}
  DEPENDS ${fuzz_objects} VERBATIM)

set(fuzz_programs)
foreach(file IN LISTS fuzz_files)
  get_filename_component(target ${file} NAME_WE)
  string(REGEX REPLACE "^fuzz_" "" name ${target})
  set(program ${CMAKE_CURRENT_BINARY_DIR}/${target})
  add_custom_command(
    OUTPUT ${program}
    COMMAND ${VKP_FUZZ_CLANG} ${fuzz_flags} -fsanitize=fuzzer,address,undefined -I${root}
            -I${CMAKE_CURRENT_SOURCE_DIR} ${file} ${fuzz_archive} -o ${program}
    DEPENDS ${file} ${fuzz_archive} ${root}/valkey_push.h VERBATIM)
  list(APPEND fuzz_programs ${program})
  add_test(NAME fuzz.${name}
           COMMAND sh ${CMAKE_CURRENT_SOURCE_DIR}/fuzz/run.sh ${program}
                   ${CMAKE_CURRENT_SOURCE_DIR}/fuzz ${name}
                   ${CMAKE_CURRENT_BINARY_DIR}/fuzz_${name}.found ${VKP_FUZZ_SECONDS})
  math(EXPR fuzz_timeout "${VKP_FUZZ_SECONDS} * 2 + 120")
  set_tests_properties(fuzz.${name} PROPERTIES LABELS fuzz TIMEOUT ${fuzz_timeout})
endforeach()
add_custom_target(vkp_fuzz ALL DEPENDS ${fuzz_programs})
