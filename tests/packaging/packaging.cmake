# packaging.<way>: programs from outside the tree come by it in each of the ways that
# packaging/README.md promises; the relay's package; the recipes for other package managers.
string(REPLACE ";" " " guests_found "${guests}")
set(packaging_environment "CC=${CMAKE_C_COMPILER}" "CXX=${CMAKE_CXX_COMPILER}"
                          "GUESTS=${guests_found}")
function(add_packaging_test name script)
  add_test(NAME packaging.${name}
           COMMAND sh ${CMAKE_CURRENT_SOURCE_DIR}/packaging/${script} ${ARGN}
                   ${CMAKE_CURRENT_BINARY_DIR}/packaging/${name})
  set_tests_properties(packaging.${name} PROPERTIES LABELS packaging TIMEOUT 300 SKIP_RETURN_CODE
                                                    77 ENVIRONMENT "${packaging_environment}")
endfunction()
foreach(way IN ITEMS find_package pkg_config add_subdirectory FetchContent)
  add_packaging_test(${way} consumer.sh ${way} ${root} ${PROJECT_BINARY_DIR})
endforeach()
add_packaging_test(recipes recipes.sh ${root})
if(relay_targets AND CMAKE_SYSTEM_NAME STREQUAL "Linux")
  add_packaging_test(deb deb.sh ${root} ${PROJECT_BINARY_DIR})
endif()
