# `cpack -G DEB` in the build folder: the relay, its manual page, a systemd unit for users.
set(doc_dir share/doc/valkey-push-relay)
install(FILES LICENSE DESTINATION ${doc_dir} COMPONENT Relay EXCLUDE_FROM_ALL RENAME copyright)
install(FILES CHANGELOG.md DESTINATION ${doc_dir} COMPONENT Relay EXCLUDE_FROM_ALL
        RENAME changelog)

set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME valkey-push-relay)
set(CPACK_PACKAGE_VENDOR "valkey_push contributors")
set(CPACK_PACKAGE_CONTACT "valkey_push contributors <valkey-push@localhost>")
set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
set(CPACK_STRIP_FILES ON)
set(CPACK_COMPONENTS_ALL Relay)
set(CPACK_DEB_COMPONENT_INSTALL ON)
set(CPACK_PRE_BUILD_SCRIPTS ${CMAKE_CURRENT_SOURCE_DIR}/packaging/deb_compress.cmake)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_RELAY_PACKAGE_NAME valkey-push-relay)
set(CPACK_DEBIAN_RELAY_PACKAGE_SECTION net)
set(CPACK_DEBIAN_PACKAGE_CONTROL_STRICT_PERMISSION ON)
set(CPACK_COMPONENT_RELAY_DESCRIPTION
    "local clients share connections to a Valkey server
Any number of local programs subscribe, and send commands, through a Unix
socket and one connection upstream, with the client libraries that they
already use. Without a server it is a stand-alone pub/sub broker.")
find_program(VKP_SHLIBDEPS dpkg-shlibdeps)
mark_as_advanced(VKP_SHLIBDEPS)
if(VKP_SHLIBDEPS)
  set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
else()
  set(CPACK_DEBIAN_RELAY_PACKAGE_DEPENDS libc6)
endif()
include(CPack)
