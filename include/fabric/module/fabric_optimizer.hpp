// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/optim/optimizer.h>

#include "fabric/precision/grad_scaler.hpp"

namespace fabric {

namespace detail {

template <class T>
concept OptimizerItself = std::derived_from<std::remove_cvref_t<T>, torch::optim::Optimizer>;
template <class T>
concept OptimizerPointer = requires(const std::remove_cvref_t<T>& pointer) {
  { *pointer } -> OptimizerItself;
  {pointer.get()};
};

}  // namespace detail

/// What `setup` takes as an optimizer: one of `torch::optim`'s, or one derived like them, by reference (the caller's
/// object stays usable, for learning rates, schedulers and states, and must outlive what `setup` returns), by value, or
/// by smart pointer. Steps go through what `setup` returns: the object's own `step()` would neither unscale gradients
/// nor find out that they are not averaged.
template <class T>
concept OptimizerArgument = detail::OptimizerItself<T> || detail::OptimizerPointer<T>;

namespace detail {

template <OptimizerArgument T>
auto shared_optimizer(T&& argument) {
  if constexpr (OptimizerItself<T>) {
    using O = std::remove_cvref_t<T>;
    if constexpr (std::is_lvalue_reference_v<T>) {
      return std::shared_ptr<O>(std::shared_ptr<void>(), &argument);
    } else {
      return std::make_shared<O>(std::forward<T>(argument));
    }
  } else {
    using O = std::remove_reference_t<decltype(*argument)>;
    return std::shared_ptr<O>(std::forward<T>(argument));
  }
}

}  // namespace detail

namespace detail {

/// An optimizer's part in gradient scaling; empty where the precision scales nothing.
template <class Precision>
struct Scaling {};
template <class Precision>
requires Precision::has_scaler struct Scaling<Precision> {
  std::shared_ptr<GradScaler> scaler;
  std::shared_ptr<GradScaler::Gradients> gradients;
};

/// `zero_grad` for gradients that are views of buckets, which cannot be detached in place as LibTorch's own does it. A
/// template for fabric/separate.hpp.
template <class = void>
void drop_gradients(torch::optim::Optimizer& optimizer, bool set_to_none) {
  const at::NoGradGuard no_grad;
  for (auto& group : optimizer.param_groups()) {
    for (at::Tensor& parameter : group.params()) {
      if (!parameter.grad().defined()) continue;
      set_to_none ? parameter.mutable_grad().reset() : static_cast<void>(parameter.mutable_grad().zero_());
    }
  }
}

}  // namespace detail

/// An optimizer as `setup` returns it: `step` first makes sure that the gradients are the ones of all ranks, and not
/// scaled any more.
template <class O, class Engine, class Precision>
class FabricOptimizer {
 public:
  using ModuleState = typename Engine::ModuleState;
  using Scaling = detail::Scaling<Precision>;

  /// `states` are those of the modules whose parameters this optimizer changes.
  FabricOptimizer(std::shared_ptr<O> optimizer, std::vector<std::shared_ptr<ModuleState>> states, Scaling scaling)
      : optimizer_(std::move(optimizer)), states_(std::move(states)), scaling_(std::move(scaling)) {}

  /// Changes the parameters by their gradients. Throws fabric::Error when the strategy knows that those are not
  /// averaged. Returns whether it did, so that schedulers can follow: `true`, or where a scaler may skip the step, a
  /// `Stepped`, which waits for the device only if it is asked.
  auto step() {
    before_step();
    if constexpr (Precision::has_scaler) {
      scaling_.scaler->unscale(*scaling_.gradients);
      scaling_.scaler->use(*scaling_.gradients);
      Stepped stepped = by_engine([&] { return scaling_.scaler->step(*optimizer_, *scaling_.gradients); });
      after_step();
      return stepped;
    } else {
      by_engine([&] {
        optimizer_->step();
        return true;
      });
      after_step();
      return true;
    }
  }

  /// For optimizers that evaluate the loss themselves (LBFGS): `closure` clears the gradients, computes the loss, runs
  /// backward and returns the loss. Returns what the optimizer makes of it. Where the ranks' losses differ, the
  /// optimizer gets their mean.
  template <std::invocable Closure>
  at::Tensor step(Closure&& closure) {
    static_assert(
        !Precision::has_scaler,
        "fabric: an optimizer that evaluates the loss itself would use scaled gradients: use BF16Mixed or F32, "
        "which scale nothing");
    at::Tensor result = optimizer_->step([&] {
      const at::AutoGradMode with_gradients(true);
      after_step();  // the optimizer may have tried other parameters since the last evaluation
      at::Tensor loss = closure();
      before_step();
      if constexpr (requires(const ModuleState& state) { Engine::mean_loss(state, loss); }) {
        if (!states_.empty()) loss = Engine::mean_loss(*states_.front(), loss);
      }
      return loss;
    });
    after_step();
    return result;
  }

  /// Drops the gradients, or with `set_to_none` false fills them with zeros.
  void zero_grad(bool set_to_none = true) {
    if constexpr (std::is_empty_v<ModuleState>) {
      optimizer_->zero_grad(set_to_none);
    } else {
      detail::drop_gradients(*optimizer_, set_to_none);
    }
    for (const auto& state : states_) Engine::after_zero_grad(*state, *optimizer_);
  }

  /// The optimizer itself, for learning rates and schedulers.
  [[nodiscard]] O& optimizer() const { return *optimizer_; }
  O* operator->() const { return optimizer_.get(); }
  /// Those of the modules whose parameters it changes.
  [[nodiscard]] const std::vector<std::shared_ptr<ModuleState>>& states() const { return states_; }
  /// What the precision's scaler keeps for this optimizer.
  [[nodiscard]] const Scaling& scaling() const { return scaling_; }

 private:
  /// `step()`, as the engine wants it.
  template <class Step>
  auto by_engine(const Step& step) {
    if constexpr (requires { Engine::step(states_, *optimizer_, step); }) {
      return Engine::step(states_, *optimizer_, step);
    } else {
      return step();
    }
  }
  void before_step() {
    for (const auto& state : states_) Engine::before_step(*state);
  }
  void after_step() {
    if constexpr (requires(ModuleState & state) { Engine::after_step(state); }) {
      for (const auto& state : states_) Engine::after_step(*state);
    }
    if constexpr (requires { Precision::after_step(); }) Precision::after_step();
  }

  std::shared_ptr<O> optimizer_;
  std::vector<std::shared_ptr<ModuleState>> states_;
  [[no_unique_address]] Scaling scaling_;
};

}  // namespace fabric
