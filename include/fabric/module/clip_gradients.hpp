// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "fabric/error.hpp"
#include "fabric/module/parameters.hpp"

namespace fabric {

/// Scale all gradients together so that their norm is at most `max_norm`.
struct ClipNorm {
  double max_norm;
  double norm_type = 2.0;          ///< 2 for Euclidean, infinity for the largest element.
  bool error_if_nonfinite = true;  ///< Refuse gradients with infinities or NaNs, which scaling cannot mend.
};

/// Bound each element of each gradient to [-max_value, max_value].
struct ClipValue {
  double max_value;
};

namespace detail {

inline void check_bound(const char* name, double bound) {
  if (bound >= 0) return;
  throw Error(std::string("fabric: clip_gradients: ") + name + " is " + std::to_string(bound) +
              ": zero or more is legal");
}

[[noreturn]] inline void refuse_nonfinite(const NamedParameters& named, double norm) {
  std::string names;
  for (const auto& [name, parameter] : named) {
    if (parameter.grad().defined() && !at::isfinite(parameter.grad()).all().item<bool>()) {
      names += (names.empty() ? "" : ", ") + name;
    }
  }
  throw Error("fabric: the norm of the gradients is " + std::to_string(norm) + ", because of " +
              (names.empty() ? "their sum" : names) +
              ": nothing was clipped. Lower the learning rate, or clip with error_if_nonfinite = false");
}

}  // namespace detail

/// Clips the gradients of `named` parameters and returns their norm from before, a tensor without dimensions; zero if
/// there are none. Throws fabric::Error for a norm that is not finite, and then has changed nothing.
inline at::Tensor clip_gradients(const NamedParameters& named, const ClipNorm& clip) {
  detail::check_bound("max_norm", clip.max_norm);
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> gradients;
  for (const auto& [name, parameter] : named) {
    if (parameter.grad().defined()) gradients.push_back(parameter.grad());
  }
  if (gradients.empty()) return at::zeros({});
  const at::Tensor norm =
      at::linalg_vector_norm(at::stack(at::_foreach_norm(gradients, clip.norm_type)), clip.norm_type);
  if (clip.error_if_nonfinite) {
    const double value = norm.item<double>();
    if (!std::isfinite(value)) detail::refuse_nonfinite(named, value);
  }
  constexpr double epsilon = 1e-6;  // torch.nn.utils.clip_grad_norm_'s
  at::_foreach_mul_(gradients, at::clamp_max(clip.max_norm / (norm + epsilon), 1.0));
  return norm;
}

/// Clips each element of the gradients.
inline void clip_gradients(const NamedParameters& named, const ClipValue& clip) {
  detail::check_bound("max_value", clip.max_value);
  const at::NoGradGuard no_grad;
  for (const auto& [name, parameter] : named) {
    if (parameter.grad().defined()) parameter.mutable_grad().clamp_(-clip.max_value, clip.max_value);
  }
}

}  // namespace fabric
