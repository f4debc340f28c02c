// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include "fabric/policy/text.hpp"

namespace fabric {

/// The kind of device that tensors live on.
enum class DeviceType : std::uint8_t { cpu, cuda, mps, xla };

/// What is known of an accelerator without LibTorch.
struct AcceleratorFacts {
  Name name;                            ///< The policy's own name, for messages: "Cuda".
  Name flag;                            ///< The value of `--accelerator` that means it: "cuda".
  DeviceType device = DeviceType::cpu;  ///< Where its tensors live.
  bool built_in = true;                 ///< False for an accelerator from outside the library.
  bool available = true;                ///< From outside the library: can it be used here?
  int own_devices = 0;                  ///< From outside: how many devices `auto` means, 0 to count as `device` does.

  friend constexpr bool operator==(const AcceleratorFacts&, const AcceleratorFacts&) = default;
};

/// An accelerator policy is an empty type with `static constexpr AcceleratorFacts facts`.
template <class A>
concept AcceleratorPolicy = std::is_empty_v<A> && requires {
  { A::facts } -> std::convertible_to<AcceleratorFacts>;
};

/// The host's processors. `devices` counts processes: there is one device.
struct Cpu {
  static constexpr AcceleratorFacts facts{.name = "Cpu", .flag = "cpu", .device = DeviceType::cpu};
};

/// NVIDIA GPUs, one process each.
struct Cuda {
  static constexpr AcceleratorFacts facts{.name = "Cuda", .flag = "cuda", .device = DeviceType::cuda};
};

/// The GPU of an Apple computer: exactly one device.
struct Mps {
  static constexpr AcceleratorFacts facts{.name = "Mps", .flag = "mps", .device = DeviceType::mps};
};

/// XLA devices, TPUs above all. The flag is Lightning Fabric's.
struct Xla {
  static constexpr AcceleratorFacts facts{.name = "Xla", .flag = "tpu", .device = DeviceType::xla};
};

static_assert(AcceleratorPolicy<Cpu> && AcceleratorPolicy<Cuda> && AcceleratorPolicy<Mps> && AcceleratorPolicy<Xla>);

}  // namespace fabric
