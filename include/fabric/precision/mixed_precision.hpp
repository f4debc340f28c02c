// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fabric/precision/autocast.hpp"
#include "fabric/precision/precision_plugin.hpp"

namespace fabric {

/// `bf16-mixed`: 32-bit weights, autocast to bfloat16 in forward. bfloat16 has float's range, so that gradients need no
/// scaling.
template <>
class PrecisionPlugin<BF16Mixed> {
 public:
  static constexpr at::ScalarType dtype = at::kBFloat16;
  static constexpr bool has_scaler = false;

  using InitContext = NoContext;
  struct ForwardContext : AutocastGuard {
    explicit ForwardContext(at::DeviceType device) : AutocastGuard(device, dtype) {}
  };

  static void convert_module(torch::nn::Module& /*module*/) {}
  template <class T>
  static auto convert_input(T&& value) {
    return detail::cast_floats(std::forward<T>(value), dtype);
  }
  template <class T>
  static auto convert_output(T&& value) {
    return detail::cast_floats(std::forward<T>(value), detail::default_dtype());
  }
};

}  // namespace fabric
