// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <torch/types.h>

#include "fabric/comm/collectives.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/error.hpp"
#include "fabric/shard/flat_unit.hpp"

namespace fabric::detail {

/// Sums the gradients of units over the ranks: those of a unit as soon as its last one has come, while backward goes
/// on. All ranks do it in the same order, which is that of the first backward on rank 0.
class GradientReduction {
 public:
  /// `units` are those that are trained, in the order in which backward should come to them. `released` is told when
  /// backward no longer needs a unit's parameters.
  GradientReduction(std::vector<FlatUnit*> units, const World& world, bool find_unused,
                    std::function<void(FlatUnit&)> released)
      : world_(world), find_unused_(find_unused), released_(std::move(released)), order_(std::move(units)) {}

  /// The gradient of slot `i` has come. Throws fabric::Error when the unit's are on their way already.
  void arrived(FlatUnit& unit, std::size_t i) {
    runs_ = true;
    auto& slots = unit.slots();
    if (std::find(complete_.begin(), complete_.end(), &unit) != complete_.end()) {
      throw Error("fabric: another gradient of " + slots[i].shard.name +
                  " came after it was averaged: call fabric.backward(loss), not loss.backward(), so that the library "
                  "knows where one backward ends; and do not use a parameter in several recomputed blocks");
    }
    slots[i].arrived = true;
    if (!std::all_of(slots.begin(), slots.end(), [](const auto& slot) { return slot.arrived; })) return;
    complete_.push_back(&unit);
    while (next_ < order_.size() && std::find(complete_.begin(), complete_.end(), order_[next_]) != complete_.end()) {
      begin(*order_[next_++]);
    }
  }
  /// The gradient of slot `i` has come, and stays on this rank.
  void arrived_locally(FlatUnit& unit, std::size_t i) {
    unit.keep_local_gradient(i);
    unaveraged_ = true;
  }

  /// Backward is over: sums what has not been summed yet, and gives the masters their gradients. Returns whether there
  /// was one since the last call.
  bool finish() {
    if (!std::exchange(runs_, false)) return false;
    unaveraged_ = false;
    if (!find_unused_) unused_ = missing();
    while (next_ < order_.size()) begin(*order_[next_++]);
    while (!leaving_.empty()) finish_oldest();
    // Now that nothing is on its way: ranks that use other parameters began other sums before.
    if (find_unused_) find_used();
    for (FlatUnit* unit : order_) {
      const auto used = used_.find(unit);
      unit->hand_out_gradients([&](std::size_t i) { return used == used_.end() || used->second[i]; });
    }
    agree_on_order();
    forget();
    return true;
  }
  /// Backward has failed: what was on its way is waited for and dropped.
  void abandon() noexcept {
    for (FlatUnit* unit : leaving_) unit->abandon();
    leaving_.clear();
    for (FlatUnit* unit : order_) {
      for (auto& slot : unit->slots()) slot.shard.parameter.mutable_grad().reset();
    }
    runs_ = false;
    forget();
  }

  /// Throws fabric::Error when the gradients are not the mean over the ranks.
  void require_averaged() {
    if (!unused_.empty()) {
      throw Error("fabric: these parameters took no part in the loss, so that their gradients cannot be averaged: " +
                  std::exchange(unused_, {}) +
                  ". Set the option find_unused_parameters, or leave them out by requires_grad_(false) before setup");
    }
    if (unaveraged_) {
      throw Error(
          "fabric: the gradients were not averaged over the ranks: the last backward ran under no_backward_sync. Step "
          "after a backward outside of it");
    }
  }
  /// An optimizer has dropped its gradients; `some_are_left` of those that stayed on this rank, which others have.
  void after_zero_grad(bool some_are_left) {
    unaveraged_ = unaveraged_ && some_are_left;
    unused_.clear();
  }

 private:
  /// Begins to sum a unit's gradients, and gives its parameters back, which backward no longer needs.
  void begin(FlatUnit& unit) {
    constexpr std::size_t at_once = 2;
    if (leaving_.size() >= at_once) finish_oldest();
    unit.begin_reduce();
    leaving_.push_back(&unit);
    released_(unit);
  }
  void finish_oldest() {
    FlatUnit& unit = *leaving_.front();
    leaving_.erase(leaving_.begin());
    unit.finish_reduce();
  }

  /// The parameters of which no gradient has come, by name.
  [[nodiscard]] std::string missing() const {
    std::string names;
    for (const FlatUnit* unit : order_) {
      for (const auto& slot : unit->slots()) {
        const at::Tensor& parameter = slot.shard.parameter;
        // One that no_backward_sync has kept is averaged now.
        if (slot.arrived || parameter.mutable_grad().defined() || !parameter.requires_grad()) continue;
        names += (names.empty() ? "" : ", ") + slot.shard.name;
      }
    }
    return names;
  }
  /// Which parameters had a part in the loss on any rank, in this backward or one before it under no_backward_sync.
  void find_used() {
    std::vector<std::int64_t> marks;
    for (const FlatUnit* unit : order_) {
      for (const auto& slot : unit->slots()) marks.push_back(slot.arrived || slot.sent ? 1 : 0);
    }
    at::Tensor all = torch::tensor(marks, at::kLong).to(world_.device);
    all = all_reduce(world_, std::move(all), ReduceOp::max).cpu();
    std::int64_t at = 0;
    for (const FlatUnit* unit : order_) {
      auto& used = used_[unit];
      for (std::size_t i = 0; i < unit->slots().size(); ++i) used.push_back(all[at++].item<std::int64_t>() != 0);
    }
  }
  /// From the second backward on, gradients are sent in the order in which they came in the first, on rank 0.
  void agree_on_order() {
    if (std::exchange(order_is_known_, true)) return;
    for (FlatUnit* unit : order_) {
      if (std::find(complete_.begin(), complete_.end(), unit) == complete_.end()) complete_.push_back(unit);
    }
    std::unordered_map<std::int64_t, FlatUnit*> by_number;
    std::vector<std::int64_t> numbers;
    for (FlatUnit* unit : complete_) {
      numbers.push_back(unit->number());
      by_number[unit->number()] = unit;
    }
    const at::Tensor agreed = broadcast(world_, torch::tensor(numbers, at::kLong));
    for (std::size_t i = 0; i < order_.size(); ++i) {
      order_[i] = by_number.at(agreed[static_cast<std::int64_t>(i)].item<std::int64_t>());
    }
  }
  /// The next backward is a new one.
  void forget() {
    for (FlatUnit* unit : order_) {
      for (auto& slot : unit->slots()) slot.arrived = slot.sent = false;
    }
    next_ = 0;
    complete_.clear();
    used_.clear();
  }

  const World& world_;
  bool find_unused_;
  std::function<void(FlatUnit&)> released_;
  std::vector<FlatUnit*> order_;     // in which gradients are sent, the same on all ranks
  std::size_t next_ = 0;             // in order_
  std::vector<FlatUnit*> complete_;  // whose gradients have all come, in this order
  std::vector<FlatUnit*> leaving_;   // on their way
  std::unordered_map<const FlatUnit*, std::vector<bool>> used_;
  bool order_is_known_ = false;
  bool runs_ = false;
  bool unaveraged_ = false;
  std::string unused_;
};

}  // namespace fabric::detail
