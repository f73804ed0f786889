# What `cmake --install` installs, for find_package and pkg-config; the relay's package by CPack.
# Two components, so that a packager can part them: Development and Relay.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/valkey_push)
set(backends_dir ${CMAKE_INSTALL_DATADIR}/valkey_push/backends)
set(generated_dir ${CMAKE_CURRENT_BINARY_DIR}/packaging)
file(GLOB backend_sources CONFIGURE_DEPENDS backends/*.[ch])

# Of the guests (valkey_push::libev and its kind) the sources are installed, like those of all
# backends of all systems: the libraries that they are built against are the program's.
target_include_directories(vkp_header INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
set_target_properties(vkp_header PROPERTIES EXPORT_NAME header)
set_target_properties(vkp_impl PROPERTIES EXPORT_NAME impl)
# A developer's build compiles the parts: the header that goes with it must be made of them.
if(VKP_DEVELOPER)
  install(CODE "execute_process(COMMAND sh \"${CMAKE_CURRENT_SOURCE_DIR}/src/amalgamate.sh\" --check
                                RESULT_VARIABLE differs)
                if(differs)
                  message(FATAL_ERROR \"valkey_push.h is not up to date: sh src/amalgamate.sh\")
                endif()" COMPONENT Development)
endif()
install(FILES valkey_push.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT Development)
install(FILES ${backend_sources} DESTINATION ${backends_dir} COMPONENT Development)
install(
  TARGETS vkp_header vkp_impl
  EXPORT valkey_push
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT Development)
install(
  EXPORT valkey_push
  NAMESPACE valkey_push::
  DESTINATION ${package_dir}
  FILE valkey_push-targets.cmake
  COMPONENT Development)

configure_package_config_file(
  packaging/valkey_push-config.cmake.in ${generated_dir}/valkey_push-config.cmake
  INSTALL_DESTINATION ${package_dir}
  PATH_VARS backends_dir)
# Before 1.0 a minor version may change contracts.
write_basic_package_version_file(${generated_dir}/valkey_push-config-version.cmake
                                 COMPATIBILITY SameMinorVersion)

# Relative to the .pc file: `cmake --install --prefix` chooses the place after these are written.
set(pc_dir ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
if(IS_ABSOLUTE ${pc_dir})
  set(pc_prefix ${CMAKE_INSTALL_PREFIX})
else()
  file(RELATIVE_PATH up /prefix/${pc_dir} /prefix)
  string(REGEX REPLACE "/$" "" up ${up})
  set(pc_prefix "\${pcfiledir}/${up}")
endif()
foreach(pair IN ITEMS "includedir;${CMAKE_INSTALL_INCLUDEDIR}" "libdir;${CMAKE_INSTALL_LIBDIR}"
                      "backendsdir;${backends_dir}")
  list(GET pair 0 name)
  list(GET pair 1 path)
  if(NOT IS_ABSOLUTE ${path})
    set(path "\${prefix}/${path}")
  endif()
  set(pc_${name} ${path})
endforeach()
foreach(name IN ITEMS valkey_push valkey_push_impl)
  configure_file(packaging/${name}.pc.in ${generated_dir}/${name}.pc @ONLY)
endforeach()

install(FILES ${generated_dir}/valkey_push-config.cmake
              ${generated_dir}/valkey_push-config-version.cmake
        DESTINATION ${package_dir} COMPONENT Development)
install(FILES packaging/guests.cmake DESTINATION ${package_dir} COMPONENT Development
        RENAME valkey_push-guests.cmake)
install(FILES ${generated_dir}/valkey_push.pc ${generated_dir}/valkey_push_impl.pc
        DESTINATION ${pc_dir} COMPONENT Development)

if(relay_targets)
  install(TARGETS ${relay_targets} DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT Relay)
  install(FILES packaging/valkey-push-relay.1 DESTINATION ${CMAKE_INSTALL_MANDIR}/man1
          COMPONENT Relay)
endif()
if(relay_targets AND CMAKE_SYSTEM_NAME STREQUAL "Linux")
  install(FILES packaging/valkey-push-relay.service DESTINATION lib/systemd/user COMPONENT Relay)
  if(top_level)
    include(packaging/deb.cmake)
  endif()
endif()
