// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

#include "fabric/error.hpp"
#include "fabric/module/parameters.hpp"

namespace fabric::detail {

/// What a strategy keeps for each module that a Fabric has set up, and which parameters are whose. A module is
/// forgotten when nobody uses what `setup` returned any more. A strategy that keeps nothing has an empty `State`: then
/// nothing is looked up. Defined out of the class for fabric/separate.hpp.
template <class State>
class KnownModules {
 public:
  using States = std::vector<std::shared_ptr<State>>;

  KnownModules();
  ~KnownModules();
  KnownModules(const KnownModules&) = delete;
  KnownModules& operator=(const KnownModules&) = delete;

  /// A new state, for `module`, which is known while the state lives. Throws fabric::Error if one of its parameters
  /// belongs to another module that is still set up: both would average it.
  [[nodiscard]] std::shared_ptr<State> know(const torch::nn::Module& module);

  /// The states of the modules that have the optimizer's parameters. Throws fabric::Error if a parameter is in none of
  /// them.
  [[nodiscard]] States behind(const torch::optim::Optimizer& optimizer) const;

  /// Calls `visit(state)` for each module.
  template <class Visit>
  void for_each([[maybe_unused]] const Visit& visit) const {
    if constexpr (std::is_empty_v<State>) return;
    for (const Known& known : modules_) {
      if (const auto state = known.state.lock()) visit(*state);
    }
  }

 private:
  struct Known {
    std::weak_ptr<State> state;
    ParameterSet parameters;
  };

  std::vector<Known> modules_;
};

template <class State>
KnownModules<State>::KnownModules() = default;
template <class State>
KnownModules<State>::~KnownModules() = default;

template <class State>
std::shared_ptr<State> KnownModules<State>::know(const torch::nn::Module& module) {
  if constexpr (std::is_empty_v<State>) return std::make_shared<State>();
  std::erase_if(modules_, [](const Known& known) { return known.state.expired(); });
  auto state = std::make_shared<State>();
  Known added{state, {}};
  for (const auto& [name, parameter] : parameters_of(module)) {
    for (const Known& known : modules_) {
      if (known.parameters.contains(parameter.unsafeGetTensorImpl())) {
        throw Error("fabric: setup: the parameter " + name +
                    " belongs to a module that was set up already: use what that setup returned");
      }
    }
    added.parameters.insert(parameter.unsafeGetTensorImpl());
  }
  modules_.push_back(std::move(added));
  return state;
}

template <class State>
auto KnownModules<State>::behind(const torch::optim::Optimizer& optimizer) const -> States {
  States states;
  if constexpr (std::is_empty_v<State>) return states;
  std::string strangers;
  for (const auto& [name, parameter] : parameters_of(optimizer)) {
    std::shared_ptr<State> owner;
    for (const Known& known : modules_) {
      if (known.parameters.contains(parameter.unsafeGetTensorImpl())) owner = known.state.lock();
    }
    if (owner == nullptr) {
      strangers += (strangers.empty() ? "" : ", ") + name;
    } else if (std::find(states.begin(), states.end(), owner) == states.end()) {
      states.push_back(owner);
    }
  }
  if (strangers.empty()) return states;
  throw Error(
      "fabric: setup: these of the optimizer's parameters belong to no module that was set up, so that nobody "
      "averages their gradients: " +
      strangers + ". Pass their module along, or set it up first");
}

}  // namespace fabric::detail
