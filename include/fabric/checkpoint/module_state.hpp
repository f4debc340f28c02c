// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <unordered_set>
#include <variant>

#include <torch/torch.h>

#include "fabric/checkpoint/load_plan.hpp"
#include "fabric/checkpoint/pickle_writer.hpp"
#include "fabric/checkpoint/value.hpp"

/// A module's parameters and buffers under the keys that Python's `Module.state_dict()` gives them, in its order: a
/// module's own parameters, its own buffers, then its children's.
namespace fabric::detail {

template <class Visit>
void for_each_entry(const torch::nn::Module& module, const std::string& prefix, const Visit& visit) {
  for (const auto& item : module.named_parameters(/*recurse=*/false)) {
    if (item.value().defined()) visit(inner_key(prefix, item.key()), item.value());
  }
  for (const auto& item : module.named_buffers(/*recurse=*/false)) {
    if (item.value().defined()) visit(inner_key(prefix, item.key()), item.value());
  }
  for (const auto& item : module.named_children()) for_each_entry(*item.value(), inner_key(prefix, item.key()), visit);
}

[[nodiscard]] inline Value module_state(const torch::nn::Module& module) {
  Dict state;
  for_each_entry(module, "", [&](const std::string& key, const at::Tensor& tensor) { state[key] = tensor.detach(); });
  return state;
}

inline void plan_module(const torch::nn::Module& module, const Value& value, const std::string& name, LoadPlan& plan) {
  const auto* state = std::get_if<Dict>(&value.data());
  if (state == nullptr) {
    plan.problem("'" + name + "' is " + std::string(value.kind()) + " in it, and a module here");
    return;
  }
  std::unordered_set<std::string> own;
  for_each_entry(module, "", [&](const std::string& key, const at::Tensor& tensor) {
    own.insert(key);
    const Value* saved = state->find(key);
    if (saved == nullptr) {
      plan.missing(inner_key(name, key));
    } else if (check_tensor(tensor, *saved, inner_key(name, key), plan)) {
      const auto& source = std::get<at::Tensor>(saved->data());
      plan.change([target = tensor.detach(), source]() mutable { target.copy_(source); });
    }
  });
  for (const auto& [key, saved] : *state) {
    if (!own.contains(to_text(key))) plan.unexpected(inner_key(name, to_text(key)));
  }
}

}  // namespace fabric::detail
