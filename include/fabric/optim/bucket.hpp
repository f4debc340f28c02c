// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/optim/optimizer.h>
#include <torch/types.h>

#include "fabric/error.hpp"
#include "fabric/optim/step_scale.hpp"

namespace fabric::optim {

/// What a fused optimizer keeps for a parameter, in `torch::optim::Optimizer::state()`.
struct ParamState : torch::optim::OptimizerCloneableParamState<ParamState> {
  at::Tensor step;                    ///< float32, no dimensions, on the parameter's device; undefined in SGD.
  std::array<at::Tensor, 3> tensors;  ///< Under the method's `state_names`, shaped as the parameter.
};

namespace detail {

/// Do both lie in memory in the same order, without gaps? Dimensions of size one may have any stride.
inline bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  if (a.strides() == b.strides()) return a.sizes() == b.sizes();
  if (a.sizes() != b.sizes()) return false;
  for (std::int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
  }
  return true;
}

/// `tensor` in the dtype, on the device and in the memory layout of `parameter`: itself, if it is so already.
inline at::Tensor like(const at::Tensor& tensor, const at::Tensor& parameter) {
  if (tensor.scalar_type() == parameter.scalar_type() && tensor.device() == parameter.device() &&
      same_layout(tensor, parameter)) {
    return tensor;
  }
  return at::empty_like(parameter).copy_(tensor);
}

/// Throws fabric::Error for a parameter that the fused kernels would take for something else: they walk through memory
/// element by element, and know real numbers alone.
inline void require_fusable(const at::Tensor& parameter, const std::string& name) {
  if (parameter.layout() == at::kStrided && at::isFloatingType(parameter.scalar_type()) &&
      parameter.is_non_overlapping_and_dense()) {
    return;
  }
  throw Error("fabric: " + name + " is a " + toString(parameter.scalar_type()) +
              (parameter.layout() == at::kStrided ? " tensor" : " sparse tensor") +
              ": fused optimizers take dense tensors of real numbers without gaps in memory. Use torch::optim for it");
}

/// The gradient of `parameter` as the kernel needs it: laid out as the parameter, else as a copy, which becomes the
/// gradient. (Python's kernels take the elements in the wrong order then.) Throws fabric::Error for one that does not
/// belong to the parameter.
inline at::Tensor& aligned_gradient(const at::Tensor& parameter) {
  at::Tensor& gradient = parameter.mutable_grad();
  if (gradient.layout() != at::kStrided || gradient.scalar_type() != parameter.scalar_type() ||
      gradient.sizes() != parameter.sizes() || gradient.device() != parameter.device()) {
    throw Error(std::string("fabric: a gradient is ") + toString(gradient.scalar_type()) + " of shape " +
                c10::str(gradient.sizes()) + ", " + (gradient.layout() == at::kStrided ? "" : "sparse, ") + "on " +
                gradient.device().str() + ", but its parameter is " + toString(parameter.scalar_type()) + " of shape " +
                c10::str(parameter.sizes()) + " on " + parameter.device().str() +
                ": fused optimizers take dense gradients of the parameter's dtype");
  }
  if (!same_layout(gradient, parameter)) gradient = at::empty_like(parameter).copy_(gradient);
  return gradient;
}

/// Parameters that one call of a kernel can change: of one device and dtype, and either all or none in their first
/// step.
struct Bucket {
  at::Device device;
  at::ScalarType dtype;
  bool first_step;
  std::vector<at::Tensor> parameters{};
  std::vector<at::Tensor> gradients{};  // only during a step, so that zero_grad frees their memory
  std::vector<at::Tensor> steps{};
  std::array<std::vector<at::Tensor>, 3> states{};

  /// Counts a step on each parameter, or takes it back, `by` being 1 or -1 or what a tensor says.
  void count(float by) {
    if (device.is_cpu()) {  // one addition each, instead of an operator each
      for (const at::Tensor& step : steps) *step.mutable_data_ptr<float>() += by;
    } else if (!steps.empty()) {
      at::_foreach_add_(steps, by);
    }
  }
  void count_back(const at::Tensor& found_inf) {
    if (device.is_cpu()) {
      count(-found_inf.item<float>());
    } else if (!steps.empty()) {
      at::_foreach_sub_(steps, std::vector<at::Tensor>(steps.size(), found_inf));
    }
  }
  /// The scale where this bucket's kernel can read it.
  [[nodiscard]] StepScale here(const StepScale& scale) const {
    const auto brought = [this](const at::Tensor& tensor) {
      return tensor.defined() ? tensor.to(device, /*non_blocking=*/!device.is_cpu()) : tensor;
    };
    return {brought(scale.grad_scale), brought(scale.found_inf)};
  }
};

/// Calls `update` with a copy of the bucket in 32 bits, and brings back what it has changed.
template <class Update>
void in_32_bits(const Bucket& bucket, const Update& update) {
  Bucket wide = bucket;
  wide.dtype = at::kFloat;
  const auto for_each_list = [&](const auto& visit) {
    visit(wide.parameters, bucket.parameters);
    visit(wide.gradients, bucket.gradients);
    for (std::size_t i = 0; i < bucket.states.size(); ++i) visit(wide.states[i], bucket.states[i]);
  };
  for_each_list([](std::vector<at::Tensor>& wide_list, const std::vector<at::Tensor>& /*list*/) {
    for (at::Tensor& tensor : wide_list) tensor = tensor.to(at::kFloat);
  });
  update(std::as_const(wide));
  for_each_list([](const std::vector<at::Tensor>& wide_list, const std::vector<at::Tensor>& list) {
    for (std::size_t i = 0; i < list.size(); ++i) list[i].copy_(wide_list[i]);
  });
}

inline std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

}  // namespace detail
}  // namespace fabric::optim
