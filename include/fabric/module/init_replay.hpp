// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include <ATen/autocast_mode.h>
#include <torch/types.h>

#include "fabric/error.hpp"
#include "fabric/module/init_tape.hpp"
#include "fabric/precision/autocast.hpp"

namespace fabric::detail {

/// Does what is on a tape, on a CPU's memory, and tells when a memory is done.
///
/// Operators that draw random numbers run in the order in which they were recorded, so that each draws what it would
/// have drawn then. Everything else runs as early as its operands allow, and a memory whose values are about to be
/// overwritten is given up until then: a second pass of the program over all parameters, such as `apply(init_weights)`,
/// does not make the first pass's values wait. What must wait is a memory that a later random operator reads.
class InitReplay {
 public:
  explicit InitReplay(const InitTape& tape)
      : tape_(tape),
        done_(tape.steps().size()),
        uses_(tape.memories().size()),
        next_(uses_.size()),
        storages_(uses_.size()) {
    for (std::size_t i = 0; i < tape.steps().size(); ++i) {
      for (const std::size_t memory : tape.steps()[i].memories) uses_[memory].push_back(i);
    }
  }

  /// Calls `on_done(memory)` for each memory as soon as nothing touches it any more, and forgets it thereafter. With
  /// `values` false nothing runs, and all memories are left uninitialised. Leaves the default generator where making
  /// the module at once would have left it, or, if it was used since the tape was recorded, where it is now.
  template <class OnDone>
  void run(bool values, OnDone&& on_done) {
    const AsRecorded as_recorded;
    if (values) {
      const Restored restored(tape_);
      for (std::size_t step = 0; step < done_.size(); ++step) {
        std::vector<std::size_t> ready{step};
        while (!ready.empty()) {
          const std::size_t i = ready.back();
          ready.pop_back();
          if (done_[i]) continue;
          execute(tape_.steps()[i]);
          done_[i] = true;
          for (const std::size_t memory : tape_.steps()[i].memories) advance(memory, ready, on_done);
        }
      }
    }
    for (std::size_t memory = 0; memory < uses_.size(); ++memory) {
      if (values && !uses_[memory].empty()) continue;
      on_done(memory);
      storages_[memory] = {};
    }
  }

  /// The real tensor at a place.
  [[nodiscard]] at::Tensor real(const TapePlace& place) {
    c10::Storage& storage = storages_[place.memory];
    if (!storage) {
      storage = at::empty({static_cast<int64_t>(tape_.memories()[place.memory].bytes)}, at::kByte).storage();
      numbers_[storage.unsafeGetStorageImpl()] = place.memory;
    }
    return at::empty({0}, place.dtype).set_(storage, place.offset, place.sizes, place.strides);
  }

  /// While alive, operators do no more than when they were recorded: no autograd, no autocast, no recording.
  struct AsRecorded {
    AsRecorded() = default;
    ~AsRecorded() {}
    AsRecorded(const AsRecorded&) = delete;
    AsRecorded& operator=(const AsRecorded&) = delete;
    at::NoGradGuard no_grad;
    at::AutoDispatchBelowADInplaceOrView no_tracking;
    c10::impl::ExcludeDispatchKeyGuard no_more{c10::autocast_dispatch_keyset | c10::DispatchKeySet(InitTape::key)};
    DefaultDtypeGuard dtype{c10::typeMetaToScalarType(c10::get_default_dtype())};  // steps change it
  };

  void execute(const TapeStep& step) {
    if (step.generator_state.defined()) {
      at::Generator generator = at::detail::getDefaultCPUGenerator();
      const std::scoped_lock lock(generator.mutex());
      generator.set_state(step.generator_state);
    } else if (step.bytes.defined()) {
      const TapePlace all{step.memories[0], {step.bytes.numel()}, {1}, 0, at::kByte};
      real(all).copy_(step.bytes);
    } else {
      torch::jit::Stack stack;
      call(step, stack);
      for (std::size_t i = 0; i < step.results.size(); ++i) take(step, stack[i], step.results[i]);
    }
  }

  /// Runs a step's operator on what its arguments are now.
  void call(const TapeStep& step, torch::jit::Stack& stack) {
    c10::set_default_dtype(step.default_dtype);
    for (const TapeArgument& argument : step.arguments) stack.push_back(value_of(argument));
    try {
      step.op->callBoxed(stack);
    } catch (const c10::Error& error) {
      throw Error("fabric: materialise: " + c10::toString(step.op->operator_name()) +
                  " was recorded, but failed: " + error.what_without_backtrace());
    }
  }

 private:
  /// Puts the default generator back, if it was used since the tape was recorded.
  class Restored {
   public:
    explicit Restored(const InitTape& tape) : generator_(at::detail::getDefaultCPUGenerator()) {
      const std::scoped_lock lock(generator_.mutex());
      state_ = generator_.get_state();
      was_used_ = !state_.equal(tape.state_after());
    }
    ~Restored() {
      if (!was_used_) return;
      const std::scoped_lock lock(generator_.mutex());
      generator_.set_state(state_);
    }
    Restored(const Restored&) = delete;
    Restored& operator=(const Restored&) = delete;

   private:
    at::Generator generator_;
    at::Tensor state_;
    bool was_used_ = true;
  };

  template <class OnDone>
  void advance(std::size_t memory, std::vector<std::size_t>& ready, OnDone& on_done) {
    const auto& uses = uses_[memory];
    if (++next_[memory] == uses.size()) {
      on_done(memory);
      forget(memory);
      return;
    }
    const std::size_t step = uses[next_[memory]];
    if (tape_.steps()[step].overwrites == memory) forget(memory);
    if (!tape_.steps()[step].in_order && is_next_everywhere(step)) ready.push_back(step);
  }
  [[nodiscard]] bool is_next_everywhere(std::size_t step) const {
    for (const std::size_t memory : tape_.steps()[step].memories) {
      if (uses_[memory][next_[memory]] != step) return false;
    }
    return true;
  }
  void forget(std::size_t memory) {
    if (storages_[memory]) numbers_.erase(storages_[memory].unsafeGetStorageImpl());
    storages_[memory] = {};
  }

  [[nodiscard]] c10::IValue value_of(const TapeArgument& argument) {
    const auto tensor = [&](std::size_t i) {
      if (argument.places[i]) return real(*argument.places[i]);
      if (version_of(argument.outside[i]) == argument.versions[i]) return argument.outside[i];
      throw Error(
          "fabric: materialise: a tensor from outside that the module was made from has been changed since: change a "
          "copy of it");
    };
    switch (argument.kind) {
      case TapeArgument::Kind::value: return argument.value;
      case TapeArgument::Kind::tensor: return tensor(0);
      case TapeArgument::Kind::tensors: {
        c10::List<at::Tensor> tensors;
        for (std::size_t i = 0; i < argument.places.size(); ++i) tensors.push_back(tensor(i));
        return tensors;
      }
      case TapeArgument::Kind::optional_tensors: {
        c10::List<std::optional<at::Tensor>> tensors;
        for (std::size_t i = 0; i < argument.places.size(); ++i) {
          const at::Tensor one = tensor(i);
          tensors.push_back(one.defined() ? std::optional<at::Tensor>(one) : std::nullopt);
        }
        return tensors;
      }
    }
    return {};
  }

  /// Takes what an operator returned as the memories that the recorded results have.
  void take(const TapeStep& step, const c10::IValue& value, const std::vector<std::optional<TapePlace>>& places) {
    std::vector<at::Tensor> tensors;
    if (value.isTensor()) {
      if (value.toTensor().defined()) tensors.push_back(value.toTensor());
    } else if (value.isTensorList()) {
      tensors = value.toTensorVector();
    }
    if (tensors.size() != places.size()) fail(step);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const TapePlace& place = *places[i];
      const at::Tensor& tensor = tensors[i];
      if (tensor.sizes() != at::IntArrayRef(place.sizes) || tensor.scalar_type() != place.dtype) fail(step);
      c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
      const auto known = numbers_.find(storage);
      const bool has_memory = static_cast<bool>(storages_[place.memory]);
      if (has_memory && known != numbers_.end() && known->second == place.memory) continue;  // changed in place
      const bool lies_so = tensor.strides() == at::IntArrayRef(place.strides) &&
                           tensor.storage_offset() == place.offset &&
                           tensor.storage().nbytes() >= tape_.memories()[place.memory].bytes;
      if (!has_memory && known == numbers_.end() && lies_so) {
        storages_[place.memory] = tensor.storage();
        numbers_[storage] = place.memory;
      } else {  // the kernel lays it out otherwise than the one for meta tensors
        real(place).copy_(tensor);
      }
    }
  }
  [[noreturn]] static void fail(const TapeStep& step) {
    throw Error("fabric: materialise: " + c10::toString(step.op->operator_name()) +
                " returned something else than when it was recorded, so its results depend on values: do it after the "
                "module was materialised");
  }

  const InitTape& tape_;
  std::vector<bool> done_;
  std::vector<std::vector<std::size_t>> uses_;  // of each memory: the steps that touch it
  std::vector<std::size_t> next_;               // of each memory: which of them comes next
  std::vector<c10::Storage> storages_;
  std::unordered_map<const c10::StorageImpl*, std::size_t> numbers_;
};

inline bool InitTape::evaluate(const TapeStep& step, Stack& stack) const {
  std::unordered_set<std::size_t> needed(step.memories.begin(), step.memories.end());
  std::unordered_set<std::size_t> uninitialised = needed;
  std::vector<const TapeStep*> before;
  for (auto it = steps_.rbegin(); it != steps_.rend(); ++it) {
    const auto is_needed = [&](std::size_t memory) { return needed.contains(memory); };
    if (std::none_of(it->written.begin(), it->written.end(), is_needed)) continue;
    if (it->in_order) return false;
    for (const std::size_t memory : it->memories) {
      if (needed.insert(memory).second) uninitialised.insert(memory);
    }
    for (const std::size_t memory : it->written) uninitialised.erase(memory);
    before.push_back(&*it);
  }
  if (!uninitialised.empty()) return false;
  const InitReplay::AsRecorded as_recorded;
  InitReplay replay(*this);
  for (auto it = before.rbegin(); it != before.rend(); ++it) replay.execute(**it);
  replay.call(step, stack);
  return true;
}

}  // namespace fabric::detail
