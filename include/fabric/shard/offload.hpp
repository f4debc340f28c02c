// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "fabric/shard/flat_unit.hpp"
#include "fabric/shard/offloaded_state.hpp"
#include "fabric/shard/sharded_module.hpp"

namespace fabric::detail {

/// Steps an optimizer for one unit after the other, so that the masters and the state of no more than two are in
/// memory. `step()` steps it for the parameters that have gradients; its last result is returned.
template <class Step>
auto step_by_unit(const std::vector<std::shared_ptr<ShardedModule>>& states, torch::optim::Optimizer& optimizer,
                  const Step& step) {
  // Only the unit whose turn it is has gradients: optimizers leave the others as they are.
  class Aside {
   public:
    explicit Aside(torch::optim::Optimizer& optimizer) {
      for (auto& group : optimizer.param_groups()) {
        for (at::Tensor& master : group.params())
          gradients_.emplace_back(master, std::exchange(master.mutable_grad(), at::Tensor()));
      }
    }
    ~Aside() {
      for (auto& [master, gradient] : gradients_) master.mutable_grad() = gradient;
    }
    Aside(const Aside&) = delete;
    Aside& operator=(const Aside&) = delete;
    /// The masters of the unit that the optimizer has, with their gradients.
    std::vector<at::Tensor> give_back(const FlatUnit& unit) {
      std::vector<at::Tensor> given;
      for (auto& [master, gradient] : gradients_) {
        for (const auto& slot : unit.slots()) {
          if (!slot.shard.master.is_same(master)) continue;
          master.mutable_grad() = gradient;
          given.push_back(master);
        }
      }
      return given;
    }

   private:
    std::vector<std::pair<at::Tensor, at::Tensor>> gradients_;
  };

  Aside aside(optimizer);
  std::vector<std::pair<FlatUnit*, OffloadedState*>> units;
  for (const auto& state : states) {
    for (std::size_t i = 0; i < state->units().size(); ++i) {
      units.emplace_back(state->units()[i].get(), &state->offloaded(i));
    }
  }
  std::optional<std::decay_t<decltype(step())>> result;
  for (std::size_t i = 0; i < units.size(); ++i) {
    auto [unit, state] = units[i];
    const std::vector<at::Tensor> masters = aside.give_back(*unit);
    if (masters.empty()) continue;
    state->fetch();
    unit->fetch_master();
    if (i + 1 < units.size()) {
      units[i + 1].second->begin_fetch();
      units[i + 1].first->begin_fetch_master();
    }
    result.emplace(step());
    state->put_away(optimizer, masters);
    unit->put_master_away();
    for (const at::Tensor& master : masters) master.mutable_grad().reset();
  }
  return result ? *result : step();
}

}  // namespace fabric::detail
