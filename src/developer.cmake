# The developer's build (VKP_DEVELOPER): valkey_push.h as declarations alone, and one file that is
# the implementation; both include the parts where they lie. A program that defines
# VKP_IMPLEMENTATION links the library's copy as well.
set(header_dir ${CMAKE_CURRENT_BINARY_DIR}/developer)
set(impl_file ${header_dir}/vkp_impl.c)
set(order ${CMAKE_CURRENT_SOURCE_DIR}/src/order.txt)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${order})

set(declarations "#ifndef VALKEY_PUSH_H\n#define VALKEY_PUSH_H\n")
set(implementation "#define VKP_IMPLEMENTATION\n#include \"valkey_push.h\"\n")
file(STRINGS ${order} parts REGEX "^[^#]")
foreach(part IN LISTS parts)
  set(line "#include \"${CMAKE_CURRENT_SOURCE_DIR}/src/${part}\"\n")
  if(part MATCHES "^(begin|end)\\.") # of what spans the other parts
  elseif(part MATCHES "\\.h$")
    string(APPEND declarations "${line}")
  else()
    string(APPEND implementation "${line}")
  endif()
endforeach()
string(APPEND declarations "#ifdef __cplusplus\n}\n#endif\n#endif\n")
string(APPEND implementation "#ifdef __cplusplus\n}\n#endif\n")
file(GENERATE OUTPUT ${header_dir}/valkey_push.h CONTENT "${declarations}")
file(GENERATE OUTPUT ${impl_file} CONTENT "${implementation}")

# For editors: how each part compiles alone, behind its prelude (layers.sh): compile_commands.json.
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
file(STRINGS ${order} sources REGEX "\\.c$")
list(REMOVE_ITEM sources begin.c end.c platform.c)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
                                       ${CMAKE_CURRENT_SOURCE_DIR}/src/layers.txt
                                       ${CMAKE_CURRENT_SOURCE_DIR}/src/layers.sh)
set(part_files)
foreach(part IN LISTS sources)
  set(file ${CMAKE_CURRENT_SOURCE_DIR}/src/${part})
  set(prelude ${header_dir}/prelude/${part}.h)
  execute_process(COMMAND sh ${CMAKE_CURRENT_SOURCE_DIR}/src/layers.sh ${part}
                  OUTPUT_VARIABLE text RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "src/layers.sh ${part} failed")
  endif()
  file(GENERATE OUTPUT ${prelude} CONTENT "${text}") # writes what changed alone
  set_source_files_properties(${file} PROPERTIES COMPILE_OPTIONS "-include;${prelude}")
  list(APPEND part_files ${file})
endforeach()
add_library(vkp_parts OBJECT EXCLUDE_FROM_ALL ${part_files})
target_compile_options(vkp_parts PRIVATE ${warnings} -Wno-unused-function -Wno-unused-variable)
