# SPDX-License-Identifier: Apache-2.0
#
# Finds LibTorch and defines fabric::libtorch, or sets fabric_libtorch_missing to the reason why it cannot.
# Read by this project and by its installed package. TorchConfig.cmake is of no use here: it stops without a
# CUDA toolkit, even for a program that runs on the CPU alone.
#
# In:   FABRIC_LIBTORCH    the torch folder of a wheel, a Python environment or an unpacked libtorch.zip; it is then
#                          the only place; its default is the environment variable of the same name
#       fabric_own_libtorch, CMAKE_PREFIX_PATH: where to look next
#       fabric_gloo_declarations: our declarations of gloo, which ProcessGroupGloo.hpp includes and the wheel lacks
#       FABRIC_CUDA        AUTO, ON or OFF: link LibTorch's CUDA libraries too
# Out:  FABRIC_LIBTORCH_VERSION, FABRIC_WITH_CUDA, fabric_no_cuda (why not)

set(fabric_libtorch_missing "")
set(FABRIC_LIBTORCH "" CACHE PATH "The torch folder of your own LibTorch")
# A build that configures itself again knows the environment no more, so the cache remembers it; another value replaces it.
if(NOT "$ENV{FABRIC_LIBTORCH}" STREQUAL "" AND
    (NOT FABRIC_LIBTORCH OR FABRIC_LIBTORCH STREQUAL "${fabric_libtorch_default}"))
  set(FABRIC_LIBTORCH "$ENV{FABRIC_LIBTORCH}" CACHE PATH "" FORCE)
  set(fabric_libtorch_default "$ENV{FABRIC_LIBTORCH}" CACHE INTERNAL "FABRIC_LIBTORCH as the environment had it")
endif()
set(FABRIC_CUDA AUTO CACHE STRING "CUDA engines: AUTO (where LibTorch has CUDA), ON or OFF")

set(fabric_torch_header torch/csrc/api/include/torch/torch.h)
if(FABRIC_LIBTORCH)
  find_path(fabric_torch_include ${fabric_torch_header} NO_CACHE NO_DEFAULT_PATH
    PATHS ${FABRIC_LIBTORCH} PATH_SUFFIXES include torch/include)
else()
  find_path(fabric_torch_include ${fabric_torch_header} NO_CACHE NO_DEFAULT_PATH
    PATHS ${fabric_own_libtorch} PATH_SUFFIXES torch/include)
  find_path(fabric_torch_include ${fabric_torch_header} NO_CACHE
    PATH_SUFFIXES include torch/include ../../include)
endif()
if(NOT fabric_torch_include)
  set(fabric_libtorch_missing
    "there is none in FABRIC_LIBTORCH='${FABRIC_LIBTORCH}', CMAKE_PREFIX_PATH='${CMAKE_PREFIX_PATH}'")
  if(fabric_own_libtorch)
    string(APPEND fabric_libtorch_missing " or ${fabric_own_libtorch}")
  endif()
  return()
endif()
get_filename_component(fabric_torch_root ${fabric_torch_include}/.. REALPATH)
set(fabric_torch_include ${fabric_torch_root}/include)
set(fabric_torch_lib ${fabric_torch_root}/lib)

foreach(header IN ITEMS torch/headeronly/version.h torch/csrc/api/include/torch/version.h)
  if(EXISTS ${fabric_torch_include}/${header})
    file(STRINGS ${fabric_torch_include}/${header} FABRIC_LIBTORCH_VERSION
      REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) [0-9]")
    list(TRANSFORM FABRIC_LIBTORCH_VERSION REPLACE "[^0-9]" "")
    list(JOIN FABRIC_LIBTORCH_VERSION "." FABRIC_LIBTORCH_VERSION)
    if(FABRIC_LIBTORCH_VERSION)
      break()
    endif()
  endif()
endforeach()
if(FABRIC_LIBTORCH_VERSION VERSION_LESS 2.9)
  set(fabric_libtorch_missing "${fabric_torch_root} is version '${FABRIC_LIBTORCH_VERSION}'; 2.9 or newer is needed")
  return()
endif()

# nvidia-* wheels lie beside torch and hold both the libraries that LibTorch loads and the CUDA headers.
file(GLOB fabric_nvidia LIST_DIRECTORIES true ${fabric_torch_root}/../nvidia/*)

set(FABRIC_WITH_CUDA OFF)
set(fabric_no_cuda "")
if(NOT FABRIC_CUDA)
  set(fabric_no_cuda "FABRIC_CUDA is ${FABRIC_CUDA}")
elseif(NOT EXISTS ${fabric_torch_lib}/libtorch_cuda.so)
  set(fabric_no_cuda "${fabric_torch_lib} has no libtorch_cuda.so")
else()
  find_path(fabric_cuda_include cuda_runtime_api.h NO_CACHE
    HINTS ${fabric_nvidia} $ENV{CUDA_HOME} PATHS /usr/local/cuda PATH_SUFFIXES include)
  find_path(fabric_nccl_include nccl.h NO_CACHE
    HINTS ${fabric_nvidia} $ENV{CUDA_HOME} PATHS /usr/local/cuda PATH_SUFFIXES include)
  if(NOT fabric_cuda_include)
    set(fabric_no_cuda "there is no cuda_runtime_api.h (CUDA toolkit)")
  elseif(NOT fabric_nccl_include)
    set(fabric_no_cuda "there is no nccl.h")
  else()
    set(FABRIC_WITH_CUDA ON)
  endif()
endif()
if(FABRIC_CUDA AND NOT FABRIC_CUDA STREQUAL "AUTO" AND NOT FABRIC_WITH_CUDA)
  set(fabric_libtorch_missing "FABRIC_CUDA is ${FABRIC_CUDA}, but ${fabric_no_cuda}")
  return()
endif()

if(TARGET fabric::libtorch)
  return()
endif()
foreach(library IN ITEMS c10 torch_cpu c10_cuda torch_cuda)
  if(EXISTS ${fabric_torch_lib}/lib${library}.so)
    add_library(fabric::${library} SHARED IMPORTED GLOBAL)
    set_target_properties(fabric::${library} PROPERTIES IMPORTED_LOCATION ${fabric_torch_lib}/lib${library}.so)
  endif()
endforeach()

add_library(fabric::libtorch INTERFACE IMPORTED GLOBAL)
target_compile_features(fabric::libtorch INTERFACE cxx_std_20)
target_compile_definitions(fabric::libtorch INTERFACE USE_DISTRIBUTED USE_C10D_GLOO)
target_include_directories(fabric::libtorch INTERFACE
  ${fabric_torch_include} ${fabric_torch_include}/torch/csrc/api/include)
if(NOT EXISTS ${fabric_torch_include}/gloo)
  target_include_directories(fabric::libtorch INTERFACE ${fabric_gloo_declarations})
endif()
target_link_libraries(fabric::libtorch INTERFACE fabric::torch_cpu fabric::c10)
# What LibTorch's own libraries load is found by their rpath at run time; GNU ld wants to be told.
set(fabric_rpath_link ${fabric_torch_lib})
foreach(folder IN LISTS fabric_nvidia)
  list(APPEND fabric_rpath_link ${folder}/lib)
endforeach()
list(JOIN fabric_rpath_link ":" fabric_rpath_link)
target_link_options(fabric::libtorch INTERFACE "LINKER:-rpath-link,${fabric_rpath_link}")

# With it, offloading to files goes on in the background. A program that does not offload does not load it.
find_path(fabric_uring_include liburing.h NO_CACHE)
find_library(fabric_uring uring NO_CACHE)
if(fabric_uring_include AND fabric_uring)
  target_compile_definitions(fabric::libtorch INTERFACE FABRIC_WITH_LIBURING)
  target_link_libraries(fabric::libtorch INTERFACE
    "-Wl,--push-state,--as-needed,${fabric_uring},--pop-state")
endif()

if(FABRIC_WITH_CUDA)
  target_compile_definitions(fabric::libtorch INTERFACE USE_C10D_NCCL)
  target_include_directories(fabric::libtorch INTERFACE ${fabric_cuda_include} ${fabric_nccl_include})
  # libtorch_cuda registers its operators when it is loaded, whether or not a symbol of it is used.
  target_link_libraries(fabric::libtorch INTERFACE
    -Wl,--no-as-needed fabric::torch_cuda -Wl,--as-needed fabric::c10_cuda)
endif()
