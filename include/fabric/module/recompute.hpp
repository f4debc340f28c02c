// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include <torch/autograd.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/types.h>

#include "fabric/error.hpp"
#include "fabric/module/activation_checkpointing.hpp"
#include "fabric/module/fabric_module.hpp"
#include "fabric/module/saved_tensors.hpp"
#include "fabric/module/surroundings.hpp"
#include "fabric/tree.hpp"

namespace fabric {
namespace detail {

/// What one marked call leaves behind in place of the tensors that its operators saved: how to run it again.
///
/// The graph stays the one of the first run. Its operators hold numbers in place of tensors; the first of them whose
/// backward needs its tensor makes the call run again, and what its operators save then, in the same order, is what the
/// numbers stand for. Nothing of the second run's own graph is used. So gradients arrive, and hooks run, exactly as
/// without recomputation. (PyTorch's checkpoint with use_reentrant=False works so.)
class Recomputation : public SavedTensors, public std::enable_shared_from_this<Recomputation> {
 public:
  /// Remembers the arguments' tensors, in whatever way tensors are saved outside of this call.
  void save_argument(const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    Argument& argument = arguments_.emplace_back();
    if (tensor.is_inference()) {
      argument.kept = tensor;
    } else {
      argument.saved = torch::autograd::SavedVariable(tensor, /*is_output=*/false);
    }
  }
  /// What runs the call again, on arguments that come from `next_argument()`, with their saved tensors going to the
  /// keeper that it is given.
  void set_run(std::function<void(SavedTensors&)> run) { run_ = std::move(run); }
  [[nodiscard]] at::Tensor next_argument() {
    const Argument& argument = arguments_.at(next_argument_++);
    return argument.kept.defined() ? argument.kept : argument.saved.unpack();
  }
  void first_run_is_over() { first_run_is_over_ = true; }
  void remember(const std::vector<at::Device>& devices) { surroundings_.emplace(devices); }

  std::unique_ptr<torch::autograd::SavedVariableHooks> hooks() override {
    return std::make_unique<Number>(shared_from_this());
  }

 private:
  struct Argument {
    torch::autograd::SavedVariable saved;
    at::Tensor kept;
  };
  /// A tensor that an operator of the first run saved: what is known of it.
  struct Known {
    std::vector<int64_t> sizes;
    at::ScalarType dtype = at::kFloat;
  };

  /// Stands for a saved tensor of the first run.
  class Number : public torch::autograd::SavedVariableHooks {
   public:
    explicit Number(std::shared_ptr<Recomputation> call) : call_(std::move(call)) {}
    ~Number() override { call_->drop(number_); }  // this operator's backward is over
    void call_pack_hook(const at::Tensor& tensor) override { number_ = call_->note(tensor); }
    at::Tensor call_unpack_hook() override { return call_->tensor(number_); }

   private:
    std::shared_ptr<Recomputation> call_;
    std::size_t number_ = 0;
  };

  /// What the operators of one more run saved.
  class Saved : public SavedTensors, public std::enable_shared_from_this<Saved> {
   public:
    std::unique_ptr<torch::autograd::SavedVariableHooks> hooks() override {
      return std::make_unique<Entry>(shared_from_this());
    }
    [[nodiscard]] std::size_t size() const { return tensors_.size(); }
    [[nodiscard]] const at::Tensor& operator[](std::size_t number) const { return tensors_[number]; }
    void drop(std::size_t number) { tensors_[number].reset(); }
    /// Throws as autograd does without recomputation.
    void check_unchanged(std::size_t number) const {
      if (tensors_[number]._version() == versions_[number]) return;
      throw Error(
          "fabric: recompute: the block changed a tensor in place that an operator had saved for its backward: make a "
          "copy of it before");
    }

   private:
    class Entry : public torch::autograd::SavedVariableHooks {
     public:
      explicit Entry(std::shared_ptr<Saved> saved) : saved_(std::move(saved)) {}
      void call_pack_hook(const at::Tensor& tensor) override {
        number_ = saved_->tensors_.size();
        saved_->tensors_.push_back(tensor.detach());
        saved_->versions_.push_back(static_cast<int64_t>(tensor._version()));
      }
      at::Tensor call_unpack_hook() override { return saved_->tensors_[number_]; }

     private:
      std::shared_ptr<Saved> saved_;
      std::size_t number_ = 0;
    };
    std::vector<at::Tensor> tensors_;
    std::vector<int64_t> versions_;
  };

  std::size_t note(const at::Tensor& tensor) {
    known_.push_back({tensor.sizes().vec(), tensor.scalar_type()});
    return known_.size() - 1;
  }
  void drop(std::size_t number) {
    const std::scoped_lock lock(mutex_);
    for (auto& [backward, saved] : runs_) saved->drop(number);
  }

  at::Tensor tensor(std::size_t number) {
    const std::scoped_lock lock(mutex_);
    const int backward = torch::autograd::get_current_graph_task_id();
    if (backward < 0) return (*run_again())[number];  // somebody looks at the graph
    std::shared_ptr<Saved>& saved = runs_[backward];
    if (!saved) {
      try {
        saved = run_again();
      } catch (...) {
        runs_.erase(backward);
        throw;
      }
      // If the graph is kept, so would be the tensors.
      torch::autograd::Engine::get_default_engine().queue_callback([weak = weak_from_this(), backward] {
        if (const auto self = weak.lock()) {
          const std::scoped_lock again(self->mutex_);
          self->runs_.erase(backward);
        }
      });
    }
    saved->check_unchanged(number);
    return (*saved)[number];
  }

  std::shared_ptr<Saved> run_again() {
    auto saved = std::make_shared<Saved>();
    {
      const Surroundings::Restored as_then(*surroundings_);
      next_argument_ = 0;
      run_(*saved);
    }
    // A block that asks for gradients itself comes here before its first run is over.
    bool same = first_run_is_over_ ? saved->size() == known_.size() : saved->size() >= known_.size();
    for (std::size_t i = 0; same && i < known_.size(); ++i) {
      same = (*saved)[i].sizes() == at::IntArrayRef(known_[i].sizes) && (*saved)[i].scalar_type() == known_[i].dtype;
    }
    if (same) return saved;
    throw Error("fabric: recompute: the block did something else when it was run again: it saved " +
                std::to_string(saved->size()) + " tensors for backward, at first " + std::to_string(known_.size()) +
                (saved->size() == known_.size() ? ", of other shapes" : "") +
                ". What a block does may depend on its arguments, parameters and random numbers only");
  }

  std::recursive_mutex mutex_;
  std::function<void(SavedTensors&)> run_;
  std::vector<Argument> arguments_;
  std::size_t next_argument_ = 0;
  std::optional<Surroundings> surroundings_;
  std::vector<Known> known_;
  bool first_run_is_over_ = false;
  std::unordered_map<int, std::shared_ptr<Saved>> runs_;  // by backward
};

/// While alive, a module's buffers may change; then they are what they were. Forward has changed them once already: the
/// statistics of BatchNorm count each batch once.
class SameBuffers {
 public:
  explicit SameBuffers(const torch::nn::Module* module) {
    if (module == nullptr) return;
    for (const at::Tensor& buffer : module->buffers()) {
      // Not the buffer itself: restoring it must not look like a change in place to those who saved it.
      if (buffer.defined() && !buffer.is_meta()) before_.emplace_back(buffer.variable_data(), buffer.detach().clone());
    }
  }
  ~SameBuffers() {
    const at::NoGradGuard no_grad;
    for (auto& [buffer, before] : before_) buffer.copy_(before);
  }
  SameBuffers(const SameBuffers&) = delete;
  SameBuffers& operator=(const SameBuffers&) = delete;

 private:
  std::vector<std::pair<at::Tensor, at::Tensor>> before_;
};

/// A stored argument as the call was given it.
template <class Argument>
decltype(auto) as_given(std::decay_t<Argument>& stored) {
  if constexpr (std::is_same_v<std::decay_t<Argument>, std::remove_cvref_t<Argument>>) {
    return static_cast<Argument&&>(stored);
  } else {
    return static_cast<std::decay_t<Argument>&>(stored);  // what was an array or a function
  }
}

/// `function(arguments...)`, to be run again in backward. `module` is what it runs, or null.
template <class Function, class... Arguments>
auto run_recomputed(const torch::nn::Module* module, Function function, Arguments&&... arguments) {
  const auto call = std::make_shared<Recomputation>();
  std::vector<at::Device> devices;
  std::tuple<std::decay_t<Arguments>...> stored(arguments...);
  tree::for_each(stored, [&](at::Tensor& tensor) {
    call->save_argument(tensor);
    if (tensor.defined()) devices.push_back(tensor.device());
    tensor.reset();  // so that nothing but what saves tensors holds it
  });
  call->remember(devices);
  call->set_run([call = call.get(), module, function, stored = std::move(stored)](SavedTensors& keeper) {
    auto again = stored;
    auto once_more = function;
    tree::for_each(again, [&](at::Tensor& tensor) { tensor = call->next_argument(); });
    const SameBuffers same(module);
    const SavedTensors::Guard guard(keeper);
    std::apply([&](auto&... values) { static_cast<void>(once_more(as_given<Arguments>(values)...)); }, again);
  });
  const SavedTensors::Guard guard(*call);
  auto result = function(std::forward<Arguments>(arguments)...);
  call->first_run_is_over();
  return result;
}

}  // namespace detail

/// Runs a block, `block->forward(arguments...)` or `block(arguments...)` for a function, without keeping the tensors
/// that its operators save for backward: backward runs it again when it needs the first of them, with the same random
/// numbers, autocast and default dtype. So a chain of blocks needs the memory of their inputs and of one block's
/// inside, and a third more time.
///
///     for (auto& block : blocks) x = fabric::recompute(block, x);
///
/// Whether a marked call is recomputed is decided by `checkpoint_activations` and `ActivationCheckpointing`; where it
/// is not, and where no gradients are recorded, it is a plain call. Arguments are trees of tensors (fabric/tree.hpp)
/// and whatever else can be copied; the result may be anything. Calls may be nested. Gradients are those of a plain
/// call bit for bit, and arrive in the same order, in the same backward.
///
/// The block must do the same again: it may depend on its arguments, parameters and random numbers only. A module that
/// is given by reference, and what a function captures by reference, must live until backward is over; what a function
/// captures by value is kept. Buffers that the module changes are changed once (a function's are changed twice).
///
/// In backward, fabric::Error is thrown when the block did something else the second time, and what the block itself
/// throws.
template <class Block, class... Arguments>
auto recompute(Block&& block, Arguments&&... arguments) {
  const bool records = at::GradMode::is_enabled();
  if constexpr (ModuleArgument<Block>) {
    const auto module = detail::shared_module(block);
    if (!records || !detail::activation_checkpointing().applies_to(module.get())) {
      return module->forward(std::forward<Arguments>(arguments)...);
    }
    return detail::run_recomputed(
        module.get(), [module](auto&&... inputs) { return module->forward(std::forward<decltype(inputs)>(inputs)...); },
        std::forward<Arguments>(arguments)...);
  } else {
    if (!records || !detail::activation_checkpointing().applies_to(nullptr)) {
      return std::invoke(block, std::forward<Arguments>(arguments)...);
    }
    return detail::run_recomputed(nullptr, std::decay_t<Block>(std::forward<Block>(block)),
                                  std::forward<Arguments>(arguments)...);
  }
}

/// `net->forward(x)` of a Sequential whose modules take and return one tensor, with each of them marked by `recompute`.
[[nodiscard]] inline at::Tensor recompute_each(torch::nn::SequentialImpl& net, at::Tensor x) {
  for (torch::nn::AnyModule& child : net) {
    const auto module = child.ptr();
    if (at::GradMode::is_enabled() && detail::activation_checkpointing().applies_to(module.get())) {
      x = detail::run_recomputed(
          module.get(), [child](const at::Tensor& input) mutable { return child.forward(input); }, x);
    } else {
      x = child.forward(x);
    }
  }
  return x;
}

}  // namespace fabric
