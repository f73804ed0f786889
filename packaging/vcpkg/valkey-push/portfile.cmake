# An overlay port: it builds the tree that it lies in. A port that downloads a release has
# vcpkg_from_github in place of the next line; the rest stays.
get_filename_component(SOURCE_PATH "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

vcpkg_check_features(OUT_FEATURE_OPTIONS FEATURE_OPTIONS FEATURES relay VKP_EXAMPLES)
vcpkg_cmake_configure(
  SOURCE_PATH "${SOURCE_PATH}"
  OPTIONS ${FEATURE_OPTIONS} -DVKP_DEVELOPER=OFF -DVKP_TESTS=OFF -DVKP_BENCH=OFF -DVKP_INSTALL=ON)
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(PACKAGE_NAME valkey_push CONFIG_PATH lib/cmake/valkey_push)
vcpkg_fixup_pkgconfig()
if("relay" IN_LIST FEATURES)
  vcpkg_copy_tools(TOOL_NAMES valkey-push-relay AUTO_CLEAN)
endif()

# Header, backends and CMake files are those of the release build.
file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/debug/include" "${CURRENT_PACKAGES_DIR}/debug/share"
     "${CURRENT_PACKAGES_DIR}/debug/lib/systemd" "${CURRENT_PACKAGES_DIR}/lib/systemd")
file(INSTALL "${CMAKE_CURRENT_LIST_DIR}/usage" DESTINATION "${CURRENT_PACKAGES_DIR}/share/${PORT}")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
