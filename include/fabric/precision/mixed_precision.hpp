// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fabric/precision/autocast.hpp"
#include "fabric/precision/grad_scaler.hpp"
#include "fabric/precision/precision_plugin.hpp"

namespace fabric {

namespace detail {

/// Weights as they are, autocast to `compute` in forward. Gradients in half floats need scaling; those in bfloat16,
/// which has float's range, do not.
template <at::ScalarType compute>
class MixedPrecision {
 public:
  static constexpr at::ScalarType dtype = compute;
  static constexpr bool has_scaler = dtype == at::kHalf;

  using Options = std::conditional_t<has_scaler, GradScalerOptions, NoOptions>;
  using InitContext = NoContext;
  struct ForwardContext : AutocastGuard {
    explicit ForwardContext(at::DeviceType device) : AutocastGuard(device, dtype) {}
  };

  static void convert_module(torch::nn::Module& /*module*/) {}
  template <class T>
  static auto convert_input(T&& value) {
    return cast_floats(std::forward<T>(value), dtype);
  }
  template <class T>
  static auto convert_output(T&& value) {
    return cast_floats(std::forward<T>(value), default_dtype());
  }
  /// In an autocast that goes on over several steps, the weights that it has cast are now old.
  static void after_step() { at::autocast::clear_cache(); }
};

}  // namespace detail

/// `16-mixed`.
template <>
class PrecisionPlugin<F16Mixed> : public detail::MixedPrecision<at::kHalf> {};

/// `bf16-mixed`.
template <>
class PrecisionPlugin<BF16Mixed> : public detail::MixedPrecision<at::kBFloat16> {};

}  // namespace fabric
