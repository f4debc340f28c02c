// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

namespace fabric {

namespace detail {

template <class T>
inline constexpr bool is_module_holder = false;
template <class Impl>
inline constexpr bool is_module_holder<torch::nn::ModuleHolder<Impl>> = true;

template <class T>
concept ModuleImpl = std::derived_from<std::remove_cvref_t<T>, torch::nn::Module>;
template <class T>
concept ModulePointer = requires(const std::remove_cvref_t<T>& pointer) {
  { *pointer } -> ModuleImpl;
  {pointer.get()};
};
template <class T>
concept ModuleHolder = requires(const std::remove_cvref_t<T>& holder) {
  { *holder } -> ModuleImpl;
  {holder.ptr()};
};

}  // namespace detail

/// What `setup` takes as a module: a `ModuleHolder` such as `Net` or `Sequential`, a `std::shared_ptr` or
/// `std::unique_ptr` to a module, or a module itself. A module given by reference must outlive what `setup` returns.
template <class T>
concept ModuleArgument = detail::ModuleImpl<T> || detail::ModulePointer<T> || detail::ModuleHolder<T>;

namespace detail {

/// The module behind any `ModuleArgument`, owned where the argument owns it.
template <ModuleArgument T>
auto shared_module(T&& argument) {
  if constexpr (ModuleImpl<T>) {
    using M = std::remove_cvref_t<T>;
    if constexpr (std::is_lvalue_reference_v<T>) {
      return std::shared_ptr<M>(std::shared_ptr<void>(), &argument);
    } else {
      return std::make_shared<M>(std::forward<T>(argument));
    }
  } else if constexpr (ModuleHolder<T>) {
    return argument.ptr();
  } else {
    using M = std::remove_reference_t<decltype(*argument)>;
    return std::shared_ptr<M>(std::forward<T>(argument));
  }
}

}  // namespace detail

/// A module as `setup` returns it: calling it runs the strategy's and the precision's part around the module's forward.
/// Copies share the module.
template <class M, class Engine, class Precision>
class FabricModule {
 public:
  using ModuleState = typename Engine::ModuleState;

  FabricModule(std::shared_ptr<M> module, std::shared_ptr<ModuleState> state, at::DeviceType device)
      : module_(std::move(module)), state_(std::move(state)), device_(device) {}

  /// Runs forward, with any arguments that it takes, and returns what it returns. Floating-point tensors in arguments
  /// and result are converted as the precision says.
  template <class... Arguments>
  auto operator()(Arguments&&... arguments) const {
    return run([](M& module, auto&&... inputs) { return module.forward(std::forward<decltype(inputs)>(inputs)...); },
               std::forward<Arguments>(arguments)...);
  }

  /// Another method that is to run like forward: `auto encode = model.mark_forward_method(&Net::encode)`, then
  /// `encode(x)`. A method called on the module directly gets no autocast, and its gradients are not averaged.
  template <class Method>
  requires std::is_member_function_pointer_v<Method>
  [[nodiscard]] auto mark_forward_method(Method method) const {
    return [self = *this, method](auto&&... arguments) {
      return self.run(method, std::forward<decltype(arguments)>(arguments)...);
    };
  }

  /// The module itself.
  [[nodiscard]] M& module() const { return *module_; }
  M* operator->() const { return module_.get(); }
  [[nodiscard]] std::shared_ptr<M> ptr() const { return module_; }

  /// What the strategy keeps for this module.
  [[nodiscard]] const std::shared_ptr<ModuleState>& state() const { return state_; }

 private:
  template <class Function, class... Arguments>
  auto run(Function&& function, Arguments&&... arguments) const {
    static_assert(!std::is_void_v<std::invoke_result_t<
                      Function, M&, decltype(Precision::convert_input(std::forward<Arguments>(arguments)))...>>,
                  "fabric: a forward method returns what the loss is made from; this one returns nothing");
    return Precision::convert_output(Engine::forward(*state_, [&] {
      typename Precision::ForwardContext context(device_);
      return std::invoke(function, *module_, Precision::convert_input(std::forward<Arguments>(arguments))...);
    }));
  }

  std::shared_ptr<M> module_;
  std::shared_ptr<ModuleState> state_;
  at::DeviceType device_;
};

}  // namespace fabric
