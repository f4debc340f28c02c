// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

#include <torch/optim/lbfgs.h>
#include <torch/optim/optimizer.h>

#include "fabric/error.hpp"
#include "fabric/optim/state_tensors.hpp"
#include "fabric/shard/sharded_module.hpp"

namespace fabric::detail {

/// Gives an optimizer this rank's masters in place of the module's parameters, whose state it may have already. Throws
/// fabric::Error for optimizers that do not change each element by itself.
inline void adopt_optimizer(torch::optim::Optimizer& optimizer,
                            const std::vector<std::shared_ptr<ShardedModule>>& states) {
  if (dynamic_cast<torch::optim::LBFGS*>(&optimizer) != nullptr) {
    throw Error(
        "fabric: setup: LBFGS looks at all parameters at once, which sharded ones cannot give: use an optimizer that "
        "changes each element by itself (AdamW, SGD, ...), or Ddp");
  }
  const at::NoGradGuard no_grad;
  auto& kept = optimizer.state();
  for (auto& group : optimizer.param_groups()) {
    for (at::Tensor& parameter : group.params()) {
      const Shard* own = nullptr;
      for (const auto& state : states) {
        for (const Shard& shard : state->shards()) {
          if (shard.parameter.is_same(parameter)) own = &shard;
        }
      }
      if (own == nullptr) continue;
      if (auto found = kept.find(parameter.unsafeGetTensorImpl()); found != kept.end()) {
        auto state = std::move(found->second);
        kept.erase(found);
        const bool known = optim::each_state_tensor(*state, [&](at::Tensor& tensor) {
          if (tensor.numel() != parameter.numel()) return;
          tensor = tensor.reshape({-1}).slice(0, own->begin, own->end).to(own->master.options(), false, /*copy=*/true);
        });
        if (!known) {
          throw Error(
              "fabric: setup: the optimizer " + c10::demangle(typeid(optimizer).name()) +
              " keeps a state of a type that is not known, and so cannot be sharded: set it up before its first "
              "step");
        }
        kept[own->master.unsafeGetTensorImpl()] = std::move(state);
      }
      parameter = own->master;
    }
  }
}

}  // namespace fabric::detail
