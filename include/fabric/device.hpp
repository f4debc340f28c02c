// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdlib>
#include <string>
#if __has_include(<malloc.h>)
#include <malloc.h>
#endif

#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/types.h>

#include "fabric/connector/selection.hpp"
#include "fabric/error.hpp"

namespace fabric {
namespace detail {

inline constexpr int largest_mmap_threshold = 32 * 1024 * 1024;  // that glibc takes

}  // namespace detail

/// LibTorch's name for a kind of device.
[[nodiscard]] constexpr at::DeviceType device_type_of(DeviceType type) {
  switch (type) {
    case DeviceType::cpu: return at::kCPU;
    case DeviceType::cuda: return at::kCUDA;
    case DeviceType::mps: return at::kMPS;
    case DeviceType::xla: return at::kXLA;
  }
  return at::kCPU;
}

/// The device of the process of that local rank. Throws fabric::Error when the rank is beyond the selected devices.
[[nodiscard]] inline at::Device device_of(const Selection& selection, int local_rank) {
  const at::DeviceType type = device_type_of(selection.accelerator.device);
  if (type == at::kCPU) return at::Device(type);
  const int index =
      is_parallel(selection.strategy) ? selection.devices.index_for(local_rank) : selection.single_device.index;
  if (index < 0) {
    throw Error("fabric: local rank " + std::to_string(local_rank) +
                " has no device: " + std::to_string(selection.devices.count) +
                " were selected. Start as many processes per node as devices");
  }
  return {type, static_cast<at::DeviceIndex>(index)};
}

/// Lets this process keep the memory that a step frees for the next step. glibc gives it back to the kernel, which then
/// clears each page again when it is touched: a quarter of the time of a step on a network of two million parameters.
/// Blocks of 32 MB and more, glibc's own limit, are given back all the same. Settings that the user made in the
/// environment (`MALLOC_...`, `GLIBC_TUNABLES`) stay, which it returns false for, as where another C library allocates.
inline bool keep_freed_memory() {
#ifdef __GLIBC__
  static const bool kept = [] {
    for (const char* own : {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"}) {
      if (std::getenv(own) != nullptr) return false;
    }
    constexpr int never = -1;
    return mallopt(M_MMAP_THRESHOLD, detail::largest_mmap_threshold) == 1 && mallopt(M_TRIM_THRESHOLD, never) == 1;
  }();
  return kept;
#else
  return false;
#endif
}

/// While one lives, what is allocated gets pages of its own, as what stays for long should when `keep_freed_memory` is
/// on: among what comes and goes with each step it would leave gaps that nothing fits into, a fifth of the memory of a
/// process that trains a sharded model. Not to be nested.
class OwnPages {
 public:
  /// For memory of `device`; that of others than CPUs is not the C library's.
  explicit OwnPages(at::Device device) : applies_(device.is_cpu()) { set(128 * 1024); }
  ~OwnPages() { set(detail::largest_mmap_threshold); }
  OwnPages(const OwnPages&) = delete;
  OwnPages& operator=(const OwnPages&) = delete;

 private:
  void set([[maybe_unused]] int threshold) const {
#ifdef __GLIBC__
    if (applies_ && keep_freed_memory()) mallopt(M_MMAP_THRESHOLD, threshold);
#endif
  }

  bool applies_;
};

/// Gives what is free now back to the kernel after all, once much of it will not be needed again.
inline void return_freed_memory() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

/// Makes `device` the current one of this thread. A CPU is that anyhow; there, memory is made to stay.
inline void activate(at::Device device) {
  if (device.is_cpu()) keep_freed_memory();
  if (!device.is_cuda()) return;
  c10::impl::getDeviceGuardImpl(device.type())->setDevice(device);
}

}  // namespace fabric
