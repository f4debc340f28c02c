# SPDX-License-Identifier: Apache-2.0
#
# How this project's own programs are built: where they go, ccache, mold, warnings, the precompiled torch header.

set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/bin)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_FLAGS_RELEASE "-O2 -DNDEBUG")

find_program(CCACHE ccache)
if(CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env
    CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime ${CCACHE})
endif()
find_program(MOLD mold)
if(MOLD)
  add_link_options(-fuse-ld=mold)
endif()

add_library(fabric_warnings INTERFACE)
target_compile_options(fabric_warnings INTERFACE -Wall -Wextra -Wpedantic)

# Compiles torch/torch.h and fabric/fabric.hpp once; every program on LibTorch reuses them.
if(FABRIC_TORCH)
  file(WRITE ${PROJECT_BINARY_DIR}/torch_header.cpp "")
  add_library(fabric_torch_header OBJECT ${PROJECT_BINARY_DIR}/torch_header.cpp)
  target_link_libraries(fabric_torch_header PRIVATE fabric::fabric fabric_warnings)
  target_precompile_headers(fabric_torch_header PRIVATE <torch/torch.h> <fabric/fabric.hpp>)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(fabric_torch_header PRIVATE -fpch-preprocess)
  endif()
endif()
add_custom_target(torch_half COMMENT "Every program on LibTorch")

# fabric_add_program(NAME SOURCES... [TORCH] [LIBRARIES...])
#
# One of our programs; with TORCH it links fabric::fabric, otherwise fabric::config alone.
function(fabric_add_program name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "TORCH" "" "SOURCES;LIBRARIES")
  add_executable(${name} ${arg_SOURCES})
  target_link_libraries(${name} PRIVATE fabric::config fabric_warnings ${arg_LIBRARIES})
  if(arg_TORCH)
    target_link_libraries(${name} PRIVATE fabric::fabric)
    add_dependencies(torch_half ${name})
    target_precompile_headers(${name} REUSE_FROM fabric_torch_header)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      target_compile_options(${name} PRIVATE -fpch-preprocess)
    endif()
  endif()
endfunction()
