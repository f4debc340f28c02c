// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/optim/optimizer.h>
#include <torch/types.h>

#include "fabric/shard/flat_unit.hpp"
#include "fabric/shard/offloaded_state.hpp"
#include "fabric/shard/sharded_module.hpp"

namespace fabric::detail {

/// Steps an optimizer for one unit after the other, so that the masters and the state of no more than three are in
/// memory: one that leaves, one that is stepped and one that comes. `step()` steps it for the parameters that have
/// gradients; its last result is returned.
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
    /// The masters of the unit that the optimizer has gradients for.
    std::vector<at::Tensor> of(const FlatUnit& unit) const {
      std::vector<at::Tensor> found;
      for (const auto& [master, gradient] : gradients_) {
        for (const auto& slot : unit.slots()) {
          if (slot.shard.master.is_same(master) && gradient.defined()) found.push_back(master);
        }
      }
      return found;
    }
    /// Gives them their gradients.
    void give_back(const std::vector<at::Tensor>& masters) {
      for (const auto& [master, gradient] : gradients_) {
        for (const at::Tensor& wanted : masters) {
          if (wanted.is_same(master)) wanted.mutable_grad() = gradient;
        }
      }
    }

   private:
    std::vector<std::pair<at::Tensor, at::Tensor>> gradients_;
  };

  Aside aside(optimizer);
  struct Turn {
    FlatUnit* unit;
    OffloadedState* state;
    std::vector<at::Tensor> masters;
  };
  std::vector<Turn> turns;  // of the units that change: others need not come from their files
  for (const auto& state : states) {
    for (std::size_t i = 0; i < state->units().size(); ++i) {
      FlatUnit& unit = *state->units()[i];
      if (auto masters = aside.of(unit); !masters.empty()) turns.push_back({&unit, &state->offloaded(i), masters});
    }
  }
  const auto finish_putting_away = [](const Turn& turn) {
    turn.state->finish_putting_away();
    turn.unit->finish_putting_away();
  };
  std::optional<std::decay_t<decltype(step())>> result;
  for (std::size_t i = 0; i < turns.size(); ++i) {
    const auto& [unit, state, masters] = turns[i];
    state->fetch();
    unit->fetch_master();
    if (i + 1 < turns.size()) {
      turns[i + 1].state->begin_fetch();
      turns[i + 1].unit->begin_fetch_master();
    }
    aside.give_back(masters);
    result.emplace(step());
    if (i > 0) finish_putting_away(turns[i - 1]);
    state->begin_putting_away(optimizer, masters);
    unit->begin_putting_master_away();
    for (const at::Tensor& master : masters) master.mutable_grad().reset();
  }
  if (turns.empty()) return step();
  finish_putting_away(turns.back());
  return *result;
}

}  // namespace fabric::detail
