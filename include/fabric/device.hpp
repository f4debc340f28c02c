// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/torch.h>

#include "fabric/connector/selection.hpp"
#include "fabric/error.hpp"

namespace fabric {

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

/// Makes `device` the current one of this thread; nothing to do on a CPU.
inline void activate(at::Device device) {
  if (!device.is_cuda()) return;
  c10::impl::getDeviceGuardImpl(device.type())->setDevice(device);
}

}  // namespace fabric
