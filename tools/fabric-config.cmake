# SPDX-License-Identifier: Apache-2.0
#
# find_package(fabric) defines fabric::config, and fabric::fabric where a LibTorch is found: in FABRIC_LIBTORCH (also an
# environment variable) or CMAKE_PREFIX_PATH. COMPONENTS config asks for no LibTorch, COMPONENTS fabric insists on one.
@PACKAGE_INIT@

include(CMakeFindDependencyMacro)
find_dependency(Boost 1.74 CONFIG)
include(${CMAKE_CURRENT_LIST_DIR}/fabric-config-target.cmake)
set(fabric_config_FOUND TRUE)

if(NOT fabric_FIND_COMPONENTS OR "fabric" IN_LIST fabric_FIND_COMPONENTS)
  set(fabric_gloo_declarations "@PACKAGE_CMAKE_INSTALL_INCLUDEDIR@/fabric/comm/gloo_declarations")
  include(${CMAKE_CURRENT_LIST_DIR}/libtorch.cmake)
  if(NOT fabric_libtorch_missing)
    include(${CMAKE_CURRENT_LIST_DIR}/fabric-fabric-target.cmake)
    set(fabric_fabric_FOUND TRUE)
  elseif(NOT fabric_FIND_COMPONENTS AND NOT fabric_FIND_QUIETLY)
    message(STATUS "fabric::fabric is left out, fabric::config is there: ${fabric_libtorch_missing}")
  endif()
endif()

check_required_components(fabric)
if(NOT fabric_FOUND AND fabric_libtorch_missing)
  set(fabric_NOT_FOUND_MESSAGE "fabric needs LibTorch: ${fabric_libtorch_missing}. "
    "Set FABRIC_LIBTORCH to the torch folder of a wheel, a Python environment or libtorch.zip.")
endif()
