// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstddef>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/types.h>

#include "fabric/error.hpp"
#include "fabric/module/parameters.hpp"

namespace fabric {

/// Scale all gradients together so that their norm is at most `max_norm`.
struct ClipNorm {
  double max_norm;
  double norm_type = 2.0;          ///< Any p above zero: 2 for Euclidean, infinity for the largest element.
  bool error_if_nonfinite = true;  ///< Refuse gradients with infinities or NaNs, which scaling cannot mend.
};

/// Bound each element of each gradient to [-max_value, max_value].
struct ClipValue {
  double max_value;
};

/// What makes a norm of the gradients that this rank holds the norm of all of them: here, nothing. A strategy that
/// shards gradients gives `clip_gradients` a function of its own, which is called once on every rank with the sum of
/// the p-th powers of this rank's elements and returns the sum over the ranks; for p = infinity, with the largest
/// element, and returns the largest. The argument and the result are float64 tensors without dimensions.
struct WholeGradients {};

namespace detail {

inline void check_bound(const char* name, double bound) {
  if (bound >= 0) return;
  throw Error(std::string("fabric: clip_gradients: ") + name + " is " + std::to_string(bound) +
              ": zero or more is legal");
}

inline void check_clip(const ClipNorm& clip) {
  check_bound("max_norm", clip.max_norm);
  if (clip.norm_type > 0) return;
  throw Error("fabric: clip_gradients: norm_type is " + std::to_string(clip.norm_type) +
              ": a number above zero or infinity is legal");
}

/// Tensors that one foreach kernel can take: of one device and dtype.
inline std::vector<std::vector<at::Tensor>> by_device_and_dtype(const std::vector<at::Tensor>& tensors) {
  std::vector<std::vector<at::Tensor>> lists;
  for (const at::Tensor& tensor : tensors) {
    std::vector<at::Tensor>* own = nullptr;
    for (auto& list : lists) {
      if (list[0].scalar_type() == tensor.scalar_type() && list[0].device() == tensor.device()) own = &list;
    }
    if (own == nullptr) own = &lists.emplace_back();
    own->push_back(tensor);
  }
  return lists;
}

/// The norm of all elements together, on the device of the first tensor.
inline at::Tensor total_norm(const std::vector<std::vector<at::Tensor>>& lists, double norm_type) {
  std::vector<at::Tensor> norms;
  for (const auto& list : lists) {
    for (at::Tensor& norm : at::_foreach_norm(list, norm_type)) norms.push_back(norm.to(lists[0][0].device()));
  }
  return at::linalg_vector_norm(at::stack(norms), norm_type);
}

/// The norm over all ranks from what each holds, by `combine`.
template <class Combine>
at::Tensor combined_norm(const at::Tensor& own, double norm_type, Combine& combine) {
  const at::Tensor exact = own.to(at::kDouble);
  const at::Tensor all = std::isinf(norm_type) ? combine(exact) : combine(exact.pow(norm_type)).pow(1 / norm_type);
  return all.to(own.scalar_type());
}

/// Scales the gradients whose norm is `norm`, with the numbers of Python's clip_grad_norm_.
inline void scale_to(const std::vector<std::vector<at::Tensor>>& lists, const at::Tensor& norm, double max_norm) {
  // Where looking costs nothing, a factor that will be 1 is not multiplied by: for a large model a whole pass over
  // memory. Only well below the bound, so that how the factor is rounded does not matter.
  if (norm.is_cpu() && norm.item<double>() < 0.9 * max_norm) return;
  constexpr double epsilon = 1e-6;  // Python's
  const at::Tensor factor = at::clamp_max((norm + epsilon).reciprocal() * max_norm, 1.0);
  for (const auto& list : lists) at::_foreach_mul_(list, factor.to(list[0].device()));
}

template <class Owner>
[[noreturn]] void refuse_nonfinite(const Owner& owner, double norm) {
  std::string first;
  std::size_t others = 0;
  for (const auto& [name, parameter] : parameters_of(owner)) {
    if (!parameter.grad().defined() || at::isfinite(parameter.grad()).all().template item<bool>()) continue;
    first.empty() ? static_cast<void>(first = name) : static_cast<void>(++others);
  }
  throw Error("fabric: the norm of the gradients is " + std::to_string(norm) + ", because of " +
              (first.empty() ? "their sum, or of another rank's" : first) +
              (others > 0 ? " and " + std::to_string(others) + " more" : "") +
              ": nothing was clipped. Lower the learning rate, or clip with error_if_nonfinite = false");
}

template <class Owner>
void check_finite(const Owner& owner, const ClipNorm& clip, const at::Tensor& norm) {
  if (!clip.error_if_nonfinite) return;
  const double value = norm.template item<double>();
  if (!std::isfinite(value)) refuse_nonfinite(owner, value);
}

}  // namespace detail

/// Clips the gradients of `owner`, a module or an optimizer (which is faster, its parameters being in a list) or
/// `NamedParameters`, and returns their norm from before, a tensor without dimensions; zero if there are none. Numbers
/// are those of Python's `clip_grad_norm_`. `combine` is for gradients that are sharded: see `WholeGradients`. Throws
/// fabric::Error for a norm that is not finite, with the first parameter at fault, and then has changed nothing.
template <class Owner, class Combine = WholeGradients>
at::Tensor clip_gradients(const Owner& owner, const ClipNorm& clip, Combine combine = {}) {
  constexpr bool is_whole = std::is_same_v<Combine, WholeGradients>;
  detail::check_clip(clip);
  const at::NoGradGuard no_grad;
  const auto lists = detail::by_device_and_dtype(gradients_of(owner));
  if (lists.empty() && is_whole) return at::zeros({});
  at::Tensor norm = lists.empty() ? at::zeros({}) : detail::total_norm(lists, clip.norm_type);
  if constexpr (!is_whole) norm = detail::combined_norm(norm, clip.norm_type, combine);
  detail::check_finite(owner, clip, norm);
  detail::scale_to(lists, norm, clip.max_norm);
  return norm;
}

/// Clips each element of the gradients of `owner`: a module, an optimizer or `NamedParameters`. Shards clip their own.
template <class Owner>
void clip_gradients(const Owner& owner, const ClipValue& clip) {
  detail::check_bound("max_value", clip.max_value);
  const at::NoGradGuard no_grad;
  for (const auto& list : detail::by_device_and_dtype(gradients_of(owner))) {
    at::_foreach_clamp_min_(list, -clip.max_value);
    at::_foreach_clamp_max_(list, clip.max_value);
  }
}

}  // namespace fabric
