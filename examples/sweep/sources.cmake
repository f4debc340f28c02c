# SPDX-License-Identifier: Apache-2.0
#
# One translation unit for each entry of menu.hpp: a longer menu compiles side by side, and a change of one entry compiles
# that one again.
foreach(accelerator IN ITEMS Cpu)
  foreach(strategy IN ITEMS SingleDevice Ddp)
    foreach(precision IN ITEMS F32 F64 BF16 BF16Mixed)
      set(source ${CMAKE_CURRENT_BINARY_DIR}/sweep/${accelerator}_${strategy}_${precision}.cpp)
      configure_file(${CMAKE_CURRENT_LIST_DIR}/entry.cpp.in ${source} @ONLY)
      list(APPEND sources ${source})
    endforeach()
  endforeach()
endforeach()
set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/sweep.cpp PROPERTIES SKIP_PRECOMPILE_HEADERS ON) # it needs no LibTorch
