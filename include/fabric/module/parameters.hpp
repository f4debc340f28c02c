// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

namespace fabric {

/// What parameters are looked up in, each by its TensorImpl.
using ParameterSet = std::unordered_set<const c10::TensorImpl*>;

/// Parameters with their names.
using NamedParameters = std::vector<std::pair<std::string, at::Tensor>>;

/// The parameters of a module, each once, however often it is registered (tied weights), under its first name.
[[nodiscard]] inline NamedParameters parameters_of(const torch::nn::Module& module) {
  NamedParameters named;
  ParameterSet seen;
  for (const auto& item : module.named_parameters()) {
    if (seen.insert(item.value().unsafeGetTensorImpl()).second) named.emplace_back(item.key(), item.value());
  }
  return named;
}

/// The parameters of an optimizer, each once, named by their places.
[[nodiscard]] inline NamedParameters parameters_of(const torch::optim::Optimizer& optimizer) {
  NamedParameters named;
  ParameterSet seen;
  std::size_t place = 0;
  for (const auto& group : optimizer.param_groups()) {
    for (const at::Tensor& parameter : group.params()) {
      if (seen.insert(parameter.unsafeGetTensorImpl()).second) {
        named.emplace_back("parameter " + std::to_string(place), parameter);
      }
      ++place;
    }
  }
  return named;
}

/// What an optimizer steps.
[[nodiscard]] inline ParameterSet parameter_set(const torch::optim::Optimizer& optimizer) {
  ParameterSet parameters;
  for (const auto& group : optimizer.param_groups()) {
    for (const at::Tensor& parameter : group.params()) parameters.insert(parameter.unsafeGetTensorImpl());
  }
  return parameters;
}

/// The parameters themselves, for code that is written for any owner of some.
[[nodiscard]] inline const NamedParameters& parameters_of(const NamedParameters& named) { return named; }

namespace detail {

inline void add_gradient(std::vector<at::Tensor>& gradients, const at::Tensor& parameter) {
  if (at::Tensor& gradient = parameter.mutable_grad(); gradient.defined()) gradients.push_back(gradient);
}

/// Leaves out what comes again. Seldom anything does, so that is looked at first.
inline std::vector<at::Tensor> each_once(std::vector<at::Tensor> tensors) {
  std::vector<const c10::TensorImpl*> sorted;
  sorted.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) sorted.push_back(tensor.unsafeGetTensorImpl());
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end()) return tensors;
  ParameterSet seen;
  std::erase_if(tensors, [&](const at::Tensor& tensor) { return !seen.insert(tensor.unsafeGetTensorImpl()).second; });
  return tensors;
}

}  // namespace detail

/// The gradients that there are, each once, without the cost of names.
[[nodiscard]] inline std::vector<at::Tensor> gradients_of(const torch::nn::Module& module) {
  std::vector<at::Tensor> gradients;
  for (const at::Tensor& parameter : module.parameters()) detail::add_gradient(gradients, parameter);
  return detail::each_once(std::move(gradients));
}
[[nodiscard]] inline std::vector<at::Tensor> gradients_of(const torch::optim::Optimizer& optimizer) {
  std::vector<at::Tensor> gradients;
  for (const auto& group : optimizer.param_groups()) {
    for (const at::Tensor& parameter : group.params()) detail::add_gradient(gradients, parameter);
  }
  return detail::each_once(std::move(gradients));
}
[[nodiscard]] inline std::vector<at::Tensor> gradients_of(const NamedParameters& named) {
  std::vector<at::Tensor> gradients;
  for (const auto& [name, parameter] : named) detail::add_gradient(gradients, parameter);
  return detail::each_once(std::move(gradients));
}

}  // namespace fabric
