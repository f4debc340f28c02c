// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/optim/schedulers/lr_scheduler.h>

#include "fabric/checkpoint/ranks.hpp"
#include "fabric/checkpoint/value.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/module/fabric_module.hpp"
#include "fabric/module/fabric_optimizer.hpp"
#include "fabric/tree.hpp"

/// What kinds of objects a checkpoint can hold.
namespace fabric {

class State;

/// Has a state like Python's objects have.
template <class T>
concept HasStateDict = requires(const T& object, T& changed, const Value& state) {
  { object.state_dict() } -> std::convertible_to<Value>;
  changed.load_state_dict(state);
};

/// Has a state that differs by rank: `state_dict(ranks)` gathers it on rank 0, called on all ranks together, and
/// `load_state_dict(state, world, check_only)` takes this rank's part out of it; with `check_only` it changes nothing
/// and only throws what is wrong.
template <class T>
concept HasRankedState = requires(const T& object, T& changed, const Value& state, const World& world, Ranks& ranks) {
  { object.state_dict(ranks) } -> std::convertible_to<Value>;
  changed.load_state_dict(state, world, true);
};

namespace detail {

template <class T>
concept WrapsOptimizer = requires(const T& wrapper) {
  typename T::ModuleState;
  wrapper.optimizer();
};
template <class T>
concept WrapsModule = requires(const T& wrapper) {
  typename T::ModuleState;
  { wrapper.module() } -> ModuleImpl;
};
template <class T>
concept Scheduler = std::derived_from<T, torch::optim::LRScheduler>;

template <class T>
concept PlainText = std::same_as<T, std::string>;
template <class T>
concept PointerLike = !ModuleArgument<T> && !OptimizerArgument<T> && requires(const T& pointer) {
  *pointer;
  pointer.get();
};
template <class T>
inline constexpr bool is_reference_wrapper = false;
template <class T>
inline constexpr bool is_reference_wrapper<std::reference_wrapper<T>> = true;

template <class T>
concept MapLike = requires {
  typename T::key_type;
  typename T::mapped_type;
}
&&(std::same_as<typename T::key_type, std::string> || std::integral<typename T::key_type>);
template <class T>
concept ListLike = !MapLike<T> && !PlainText<T> && tree::Range<T> && requires {
  typename T::value_type;
};
template <class T>
concept GrowingList = ListLike<T> && requires(T& list, typename T::value_type value) {
  list.push_back(std::move(value));
};

/// Made of numbers, texts and tensors alone, so that it can be built from a checkpoint before anything changes.
template <class T>
constexpr bool is_data() {
  if constexpr (HasStateDict<T> || HasRankedState<T> || ModuleArgument<T> || OptimizerArgument<T> || WrapsModule<T> ||
                WrapsOptimizer<T> || PointerLike<T> || is_reference_wrapper<T>) {
    return false;
  } else if constexpr (MapLike<T>) {
    return is_data<typename T::mapped_type>();
  } else if constexpr (ListLike<T> || tree::OptionalLike<T>) {
    return is_data<typename T::value_type>();
  } else {
    return std::is_arithmetic_v<T> || std::is_enum_v<T> || PlainText<T> || std::same_as<T, at::Tensor> ||
           std::same_as<T, Value> || std::same_as<T, List> || std::same_as<T, Dict>;
  }
}

/// Dereferences what stands for a module or an optimizer.
template <class T>
auto& behind(T& object) {
  if constexpr (ModuleImpl<T> || OptimizerItself<T>) {
    return object;
  } else {
    return *object;
  }
}

template <class T>
inline constexpr bool has_no_state = false;

/// LibTorch's schedulers keep their count of steps to themselves and those that derive from them.
struct SchedulerAccess : torch::optim::LRScheduler {
  static unsigned& steps(torch::optim::LRScheduler& scheduler) { return scheduler.*(&SchedulerAccess::step_count_); }
  static std::vector<double> rates(const torch::optim::LRScheduler& scheduler) {
    return (scheduler.*(&SchedulerAccess::get_current_lrs))();
  }
};

}  // namespace detail
}  // namespace fabric
