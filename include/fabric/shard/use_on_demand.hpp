// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <torch/types.h>

#include "fabric/error.hpp"
#include "fabric/interception.hpp"
#include "fabric/shard/flat_unit.hpp"

namespace fabric::detail {

/// Who makes units whole, and how.
class UnitOwner {
 public:
  UnitOwner() = default;
  UnitOwner(const UnitOwner&) = delete;
  UnitOwner& operator=(const UnitOwner&) = delete;
  virtual ~UnitOwner() = default;
  /// An operator is about to read these units, which are to be whole until it has.
  virtual void use(const std::vector<FlatUnit*>& units) = 0;
  /// False while the owner lets parameters be changed in place.
  [[nodiscard]] virtual bool refuses_changes() const = 0;
};

/// Makes sharded parameters whole when an operator needs them.
///
/// C++ modules have no hooks, and their forward is not virtual. But every operator goes through LibTorch's dispatcher,
/// which looks at the keys of its tensors: parameters that are sharded carry one of their own, which their views
/// inherit, in forward and, saved by autograd, in backward. Its kernel looks up the unit by the storage and then calls
/// the operator. Operators on other tensors never come here, so that they cost nothing.
class UseOnDemand {
 public:
  static constexpr c10::DispatchKey key = Interception::key;

  [[nodiscard]] static UseOnDemand& instance() {
    static UseOnDemand on_demand;
    return on_demand;
  }

  /// From here on, operators on the unit's parameters ask `owner` first.
  void add(FlatUnit& unit, UnitOwner& owner) {
    Interception::add(Interception::Part::sharding, &UseOnDemand::call);
    const std::unique_lock lock(mutex_);
    units_[unit.storage()] = {&unit, &owner};
    for (const FlatUnit::Slot& slot : unit.slots())
      keys_of(slot.shard.parameter) = keys_of(slot.shard.parameter).add(key);
  }
  void remove(const FlatUnit& unit) {
    const std::unique_lock lock(mutex_);
    units_.erase(unit.storage());
    for (const FlatUnit::Slot& slot : unit.slots())
      keys_of(slot.shard.parameter) = keys_of(slot.shard.parameter).remove(key);
  }

 private:
  struct Entry {
    FlatUnit* unit = nullptr;
    UnitOwner* owner = nullptr;
  };
  /// The units of one operator's arguments: mostly one.
  struct Needed {
    UnitOwner* owner = nullptr;
    std::vector<FlatUnit*> units{};
  };

  UseOnDemand() = default;

  [[nodiscard]] Entry find(const at::Tensor& tensor) const {
    if (!tensor.defined() || !tensor.key_set().has(key) || !tensor.has_storage()) return {};
    const std::shared_lock lock(mutex_);
    const auto found = units_.find(tensor.storage().unsafeGetStorageImpl());
    return found == units_.end() ? Entry{} : found->second;
  }

  static bool call(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const auto& arguments = op.schema().arguments();
    std::vector<Needed> needed;
    const auto look = [&](const at::Tensor& tensor, std::size_t i) {
      const Entry entry = instance().find(tensor);
      if (entry.unit == nullptr) return;
      if (entry.owner->refuses_changes() && arguments[i].alias_info() != nullptr &&
          arguments[i].alias_info()->isWrite()) {
        refuse_change(op, *entry.unit, tensor);
      }
      for (Needed& known : needed) {
        if (known.owner != entry.owner) continue;
        for (const FlatUnit* unit : known.units) {
          if (unit == entry.unit) return;
        }
        return known.units.push_back(entry.unit);
      }
      needed.push_back({entry.owner, {entry.unit}});
    };
    const std::size_t first = stack->size() - arguments.size();
    for (std::size_t i = 0; i < arguments.size(); ++i) {
      const c10::IValue& value = (*stack)[first + i];
      if (value.isTensor()) {
        look(value.toTensor(), i);
      } else if (value.isList()) {
        for (const c10::IValue& item : value.toListRef()) {
          if (!item.isTensor()) break;
          look(item.toTensor(), i);
        }
      }
    }
    for (const Needed& each : needed) each.owner->use(each.units);
    op.callBoxed(*stack);
    return true;
  }

  [[noreturn]] static void refuse_change(const c10::OperatorHandle& op, const FlatUnit& unit,
                                         const at::Tensor& tensor) {
    std::string name;
    for (const FlatUnit::Slot& slot : unit.slots()) {
      if (slot.shard.parameter.storage_offset() == tensor.storage_offset()) name = slot.shard.name;
    }
    throw Error("fabric: " + op.operator_name().name + " would change the parameter " + name +
                " in place, which is sharded: the change would be lost. Change it before setup, or inside "
                "`model.state()->with_full_parameters([&] { ... })`");
  }

  mutable std::shared_mutex mutex_;
  std::unordered_map<const c10::StorageImpl*, Entry> units_;
};

}  // namespace fabric::detail
