// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include <torch/torch.h>

namespace fabric {

/// Parameters with their names.
using NamedParameters = std::vector<std::pair<std::string, at::Tensor>>;

/// The parameters of a module, each once, however often it is registered (tied weights), under its first name.
[[nodiscard]] inline NamedParameters parameters_of(const torch::nn::Module& module) {
  NamedParameters named;
  std::unordered_set<const c10::TensorImpl*> seen;
  for (const auto& item : module.named_parameters()) {
    if (seen.insert(item.value().unsafeGetTensorImpl()).second) named.emplace_back(item.key(), item.value());
  }
  return named;
}

/// The parameters of an optimizer, each once, named by their places.
[[nodiscard]] inline NamedParameters parameters_of(const torch::optim::Optimizer& optimizer) {
  NamedParameters named;
  std::unordered_set<const c10::TensorImpl*> seen;
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

}  // namespace fabric
