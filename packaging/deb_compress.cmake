# Debian wants manual pages and changelogs compressed, without the time of day in them.
file(GLOB_RECURSE texts ${CPACK_TEMPORARY_DIRECTORY}/*/valkey-push-relay.1
     ${CPACK_TEMPORARY_DIRECTORY}/*/changelog)
if(NOT texts)
  message(FATAL_ERROR "no manual page in ${CPACK_TEMPORARY_DIRECTORY}")
endif()
foreach(text IN LISTS texts)
  execute_process(COMMAND gzip -9 -n ${text} RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "gzip ${text}: ${failed}")
  endif()
endforeach()
