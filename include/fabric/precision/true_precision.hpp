// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include <torch/nn/module.h>

#include "fabric/precision/autocast.hpp"
#include "fabric/precision/precision_plugin.hpp"

namespace fabric {

/// `32-true`: nothing is converted, so that the loop is the one written by hand.
template <>
class PrecisionPlugin<F32> {
 public:
  using ForwardContext = NoContext;
  using InitContext = NoContext;
  static constexpr bool has_scaler = false;

  static void convert_module(torch::nn::Module& /*module*/) {}
  template <class T>
  static constexpr T&& convert_input(T&& value) {
    return std::forward<T>(value);
  }
  template <class T>
  static constexpr T convert_output(T&& value) {
    return std::forward<T>(value);
  }
};

namespace detail {

/// Weights, inputs and arithmetic in one dtype; outputs come back in the default dtype, so that a loss keeps its
/// digits.
template <class P>
class TruePrecision {
 public:
  static constexpr at::ScalarType dtype = dtype_of(P::facts.parameters);
  static constexpr bool has_scaler = false;

  struct InitContext : DefaultDtypeGuard {
    InitContext() : DefaultDtypeGuard(dtype) {}
  };
  struct ForwardContext : DefaultDtypeGuard {
    explicit ForwardContext(at::DeviceType /*device*/) : DefaultDtypeGuard(dtype) {}
  };

  static void convert_module(torch::nn::Module& module) {
    // Not module.to(dtype), which takes integer buffers along, such as BatchNorm's count of batches.
    const auto convert = [](std::vector<at::Tensor> tensors) {
      for (at::Tensor& tensor : tensors) {
        if (tensor.is_floating_point()) tensor.set_data(tensor.to(dtype));
      }
    };
    const at::NoGradGuard no_grad;
    convert(module.parameters());
    convert(module.buffers());
  }
  template <class T>
  static auto convert_input(T&& value) {
    return cast_floats(std::forward<T>(value), dtype);
  }
  template <class T>
  static auto convert_output(T&& value) {
    return cast_floats(std::forward<T>(value), default_dtype());
  }
};

}  // namespace detail

/// `64-true`.
template <>
class PrecisionPlugin<F64> : public detail::TruePrecision<F64> {};

/// `16-true`.
template <>
class PrecisionPlugin<F16> : public detail::TruePrecision<F16> {};

/// `bf16-true`.
template <>
class PrecisionPlugin<BF16> : public detail::TruePrecision<BF16> {};

}  // namespace fabric
