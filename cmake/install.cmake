# `cmake --install BUILD --prefix P`: the kernel room's headers and library for engines without torch,
# found with find_package(parallax) and linked as parallax::kernels.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/parallax)
set_target_properties(parallax_kernels PROPERTIES EXPORT_NAME kernels)
install(TARGETS parallax_kernels EXPORT parallax-targets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY kernels/include/parallax DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT parallax-targets NAMESPACE parallax:: DESTINATION ${package_dir})
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/parallax)
configure_package_config_file(cmake/parallax-config.cmake.in parallax-config.cmake
  INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(parallax-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/parallax-config.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/parallax-config-version.cmake DESTINATION ${package_dir})
