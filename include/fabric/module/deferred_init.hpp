// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include <torch/autograd.h>
#include <torch/nn/module.h>

#include "fabric/error.hpp"
#include "fabric/module/deferred.hpp"
#include "fabric/module/init_replay.hpp"
#include "fabric/module/init_tape.hpp"

namespace fabric {

/// Where a module's tensors come to be.
struct Materialise {
  at::Device device = at::kCPU;           ///< They are made on the CPU, then moved.
  std::optional<at::ScalarType> dtype{};  ///< Of floating-point tensors; by default the one they were made in.
  bool values = true;                     ///< False: they stay uninitialised, for a checkpoint to be loaded right away.
};

namespace detail {

/// Makes `slot` the tensor `real` without becoming another object, as `set_data` does, which does not take tensors to
/// another kind of device from a meta one.
inline void become(const at::Tensor& slot, const at::Tensor& real) {
  if (auto* meta = torch::autograd::impl::get_autograd_meta(slot)) meta->grad_accumulator_.reset();
  slot.unsafeGetTensorImpl()->shallow_copy_from(real.getIntrusivePtr());
}

/// A parameter or buffer of a module, under its first name.
struct NamedSlot {
  std::string name;
  at::Tensor tensor;
};
[[nodiscard]] inline std::vector<NamedSlot> slots_of(const torch::nn::Module& module) {
  std::vector<NamedSlot> slots;
  std::unordered_set<const c10::TensorImpl*> seen;
  const auto add = [&](const auto& items) {
    for (const auto& item : items) {
      if (item.value().defined() && seen.insert(item.value().unsafeGetTensorImpl()).second) {
        slots.push_back({item.key(), item.value()});
      }
    }
  };
  add(module.named_parameters());
  add(module.named_buffers());
  return slots;
}

/// The tape of a module's tensors, or null if none of them is deferred. A module put together from several that were
/// deferred has several; this is the first.
[[nodiscard]] inline std::shared_ptr<InitTape> deferred_tape_of(const torch::nn::Module& module) {
  for (const NamedSlot& slot : slots_of(module)) {
    if (auto tape = InitTape::of(slot.tensor)) return tape;
  }
  return nullptr;
}

}  // namespace detail

/// Does what `deferred_init` remembered of the module, and calls `on_ready(name, slot, real)` for each parameter and
/// buffer as soon as its value is final, in the order in which they become so: `slot` is the module's own tensor, still
/// without memory, `real` the value, of the slot's sizes and strides, on the device and in the dtype that were asked
/// for. What the receiver keeps of it stays; this function keeps nothing, so that memory is needed for one parameter at
/// a time (and for what a later random operator reads). Tied tensors come once, under their first name; tensors that
/// share memory come one right after the other. A tensor that the module holds without having registered it is given
/// its value. Does nothing for modules that have memory.
///
/// Throws fabric::Error for parameters on the meta device that were not made by `deferred_init`, and for what the end
/// of a scope in which they were made could not throw.
template <class OnReady>
void materialise(torch::nn::Module& module, const Materialise& options, OnReady&& on_ready) {
  std::vector<std::shared_ptr<detail::InitTape>> tapes;
  std::unordered_map<const detail::InitTape*, std::vector<std::vector<detail::NamedSlot>>> slots;  // by their memories
  std::string strangers;
  for (detail::NamedSlot& slot : detail::slots_of(module)) {
    if (!slot.tensor.is_meta()) continue;
    const auto tape = detail::InitTape::of(slot.tensor);
    if (!tape) {
      strangers += (strangers.empty() ? "" : ", ") + slot.name;
      continue;
    }
    auto& by_memory = slots[tape.get()];
    if (by_memory.empty()) {
      tapes.push_back(tape);
      by_memory.resize(tape->memories().size());
    }
    by_memory[tape->place_of(slot.tensor)->memory].push_back(std::move(slot));
  }
  if (!strangers.empty()) {
    throw Error("fabric: materialise: these are on the meta device, but nothing is known of how they are made: " +
                strangers + ". Make the module by deferred_init or init_module, and do not clone it before");
  }
  for (const auto& tape : tapes) {
    tape->throw_problem();
    auto& by_memory = slots[tape.get()];
    std::vector<std::vector<at::Tensor>> unregistered(tape->memories().size());
    std::unordered_set<const c10::TensorImpl*> registered;
    for (const auto& group : by_memory) {
      for (const detail::NamedSlot& slot : group) registered.insert(slot.tensor.unsafeGetTensorImpl());
    }
    for (const at::Tensor& tensor : tape->live_tensors()) {
      if (registered.contains(tensor.unsafeGetTensorImpl())) continue;
      if (const auto place = tape->place_of(tensor)) unregistered[place->memory].push_back(tensor);
    }
    detail::InitReplay replay(*tape);
    const auto real = [&](const at::Tensor& tensor) {
      const at::Tensor made = replay.real(*tape->place_of(tensor));
      return made.to(options.device,
                     made.is_floating_point() ? options.dtype.value_or(made.scalar_type()) : made.scalar_type());
    };
    replay.run(options.values, [&](std::size_t memory) {
      for (detail::NamedSlot& slot : by_memory[memory]) on_ready(slot.name, slot.tensor, real(slot.tensor));
      for (const at::Tensor& tensor : unregistered[memory]) detail::become(tensor, real(tensor));
    });
  }
}

/// Gives all tensors of a deferred module their values, in place: whoever holds one, such as an optimizer, has the
/// value then.
inline void materialise(torch::nn::Module& module, const Materialise& options = {}) {
  materialise(module, options, [](const std::string& /*name*/, const at::Tensor& slot, const at::Tensor& real) {
    detail::become(slot, real);
  });
}

/// Gives all tensors memory, but no values: for a checkpoint to be loaded right away.
inline void materialise_empty(torch::nn::Module& module, Materialise options = {}) {
  options.values = false;
  materialise(module, options);
}

namespace detail {

inline void materialise_on(torch::nn::Module& module, at::Device device) { materialise(module, {.device = device}); }

}  // namespace detail

/// The module that `make()` returns, without memory: its tensors are meta tensors, which have shapes alone, and every
/// operator that would have filled them is remembered. Any code that builds `torch::nn` modules will do, on one thread.
/// `materialise` does later what was remembered, so that a model can be built that is larger than memory, where each
/// tensor is reduced to this process's part as soon as it is there. Until then the module must not be called, cloned or
/// moved to a device; optimizers may be made with its parameters.
///
/// Random numbers come out as if `make()` had run at once. Throws fabric::Error, with the operator's name, where a
/// value is asked for that does not exist yet (`item()`, writing by `data_ptr`), or a tensor from outside would be
/// changed.
template <class Make>
[[nodiscard]] auto deferred_init(Make&& make) {
  if (detail::InitTape::is_recording()) return std::forward<Make>(make)();
  detail::materialise_deferred = &detail::materialise_on;
  const auto tape = std::make_shared<detail::InitTape>();
  detail::InitTape::Recording recording(*tape);
  const auto refuse = [&](const c10::Error& error) {
    throw Error(
        "fabric: deferred_init: after " + tape->last_operator() +
        " the program needs a tensor's values, which do not exist yet: do that after the module was materialised, "
        "or make this tensor outside (" +
        error.what_without_backtrace() + ")");
  };
  try {
    auto made = std::forward<Make>(make)();
    recording.finish();
    return made;
  } catch (const c10::Error& error) {
    const std::string reason = error.what_without_backtrace();
    if (reason.find("data is not allocated") == std::string::npos && reason.find("meta") == std::string::npos) throw;
    refuse(error);
    throw;
  }
}

namespace detail {

/// What class Fabric does with it; `For` only makes it a template, whose definition class Fabric need not have.
template <class For>
struct DeferredInitialisation {
  /// `init_module` with options.
  static auto run(For&& make) { return deferred_init(std::forward<For>(make)); }
  /// `sharded_model`: what `deferred_init` does, from here to the end of the scope.
  template <class Context>
  class Scope {
   public:
    explicit Scope(bool defers) {
      if (!defers || InitTape::is_recording()) return;
      materialise_deferred = &materialise_on;
      tape_ = std::make_shared<InitTape>();
      recording_.emplace(*tape_);
    }
    ~Scope() {
      if (recording_) tape_->close();
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    [[no_unique_address]] Context context_;
    std::shared_ptr<InitTape> tape_;
    std::optional<InitTape::Recording> recording_;
  };
};

}  // namespace detail
}  // namespace fabric
