// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <unordered_map>
#include <unordered_set>
#include <variant>

#include <torch/nn/module.h>

#include "fabric/checkpoint/load_plan.hpp"
#include "fabric/checkpoint/pickle_writer.hpp"
#include "fabric/checkpoint/spread.hpp"
#include "fabric/checkpoint/value.hpp"
#include "fabric/shard/tensor_slice.hpp"

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

/// What is wrong with a layer that a program has divided by itself.
inline constexpr const char* is_a_slice =
    "is this rank's slice of a parameter here (parallelize_module), which a checkpoint would take for all of it: save "
    "and load `full_tensor(slice)` and `own_part(slice, full)` of `tensor_slices(module)`";

[[nodiscard]] inline Value module_state(const torch::nn::Module& module, const std::string& name, Spread& spread) {
  Dict state;
  std::unordered_map<const c10::TensorImpl*, at::Tensor> stand_ins;  // the same one for tied parameters
  for_each_entry(module, "", [&](const std::string& key, const at::Tensor& tensor) {
    if (const auto* parameter = spread.spread_parameter(tensor)) {
      at::Tensor& stand_in = stand_ins[tensor.unsafeGetTensorImpl()];
      if (!stand_in.defined()) stand_in = spread.stand_in(*parameter, parameter->shard->master);
      state[key] = stand_in;
      return;
    }
    if (tensor_slice_of(tensor)) refuse_to_write(inner_key(name, key), is_a_slice);
    if (tensor.is_meta()) refuse_to_write(inner_key(name, key), "has no memory yet: it is on the meta device");
    if (tensor.numel() > 0 && tensor.has_storage() && tensor.storage().nbytes() == 0) {
      refuse_to_write(inner_key(name, key),
                      "has no memory, because its module is sharded: save the model that `setup` "
                      "returned, not the module that was given to it");
    }
    state[key] = tensor.detach().to(spread.dtype(tensor));
  });
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
    const auto* parameter = plan.spread().spread_parameter(tensor);
    if (parameter == nullptr && tensor_slice_of(tensor)) {
      return plan.problem("'" + inner_key(name, key) + "' " + is_a_slice);
    }
    const Value* saved = state->find(key);
    if (saved == nullptr) {
      plan.missing(inner_key(name, key));
      return;
    }
    if (parameter == nullptr) {
      const at::ScalarType dtype = plan.spread().dtype(tensor);
      const at::Tensor stored =
          dtype == tensor.scalar_type() ? tensor : at::empty_like(tensor, at::TensorOptions(dtype));
      if (check_tensor(stored, *saved, inner_key(name, key), plan)) {
        plan.fill(tensor.detach(), std::get<at::Tensor>(saved->data()));
      }
      return;
    }
    const Shard& shard = *parameter->shard;
    const at::Tensor whole = plan.spread().stand_in(*parameter, shard.master);
    if (check_tensor(whole, *saved, inner_key(name, key), plan)) {
      plan.fill_boxes(shard.master.detach(), std::get<at::Tensor>(saved->data()), parameter->boxes());
    }
  });
  for (const auto& [key, saved] : *state) {
    if (!own.contains(to_text(key))) plan.unexpected(inner_key(name, to_text(key)));
  }
}

}  // namespace fabric::detail
