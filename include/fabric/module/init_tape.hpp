// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <torch/library.h>
#include <torch/types.h>
#include <torch/utils.h>

#include "fabric/error.hpp"
#include "fabric/interception.hpp"
#include "fabric/module/init_step.hpp"

namespace fabric::detail {

/// What a module's making did, operator by operator, so that it can be done later, in parts.
///
/// Every tensor made while it records is a meta tensor: it has a shape, but no memory. What identifies the memory that
/// it would have is its storage, so that views and everything else that shares memory is recognised by itself. The
/// storages keep the tape alive, and with it what materialises them.
class InitTape : public std::enable_shared_from_this<InitTape> {
 public:
  struct Memory {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;  // weak: its address is taken as long as this stands here
    std::size_t bytes = 0;
  };

  [[nodiscard]] const std::vector<TapeStep>& steps() const { return steps_; }
  [[nodiscard]] const std::vector<Memory>& memories() const { return memories_; }
  /// The state in which the recording left the default generator.
  [[nodiscard]] const at::Tensor& state_after() const { return expected_state_; }

  /// The tensors of this tape that still exist.
  [[nodiscard]] std::vector<at::Tensor> live_tensors() const {
    std::vector<at::Tensor> tensors;
    for (const WeakTensor& live : live_) {
      if (auto tensor = live.lock()) tensors.emplace_back(at::Tensor::wrap_tensor_impl(std::move(tensor)));
    }
    return tensors;
  }

  /// Where the tensor lies, if it is one of this tape.
  [[nodiscard]] std::optional<TapePlace> place_of(const at::Tensor& tensor) const {
    if (!tensor.defined() || !tensor.is_meta() || !tensor.has_storage()) return std::nullopt;
    const auto found = numbers_.find(tensor.storage().unsafeGetStorageImpl());
    if (found == numbers_.end()) return std::nullopt;
    return TapePlace{found->second, tensor.sizes().vec(), tensor.strides().vec(), tensor.storage_offset(),
                     tensor.scalar_type()};
  }

  /// The tape of a meta tensor that was made while one recorded, else null.
  [[nodiscard]] static std::shared_ptr<InitTape> of(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_meta() || !tensor.has_storage()) return nullptr;
    const at::DataPtr& data = tensor.storage().data_ptr();
    if (data.get_deleter() != &InitTape::let_go) return nullptr;
    return *static_cast<std::shared_ptr<InitTape>*>(data.get_context());
  }

  /// While alive, this thread's operators are recorded.
  class Recording {
   public:
    explicit Recording(InitTape& tape) : included_(intercepted()), tape_(tape) {
      current() = &tape_;
      tape_.note_generator();
    }
    ~Recording() { current() = nullptr; }
    Recording(const Recording&) = delete;
    Recording& operator=(const Recording&) = delete;
    /// Throws fabric::Error for what can only be seen now.
    void finish() { tape_.finish(); }

   private:
    static c10::DispatchKey intercepted() {
      intercept();
      return key;
    }
    c10::impl::IncludeDispatchKeyGuard included_;
    InitTape& tape_;
  };

  /// The end of a scope that records, which must not throw: `throw_problem` does it later.
  void close() noexcept {
    try {
      finish();
    } catch (const Error& error) {
      problem_ = error.what();
    }
  }
  void throw_problem() const {
    if (!problem_.empty()) throw Error(problem_);
  }

  [[nodiscard]] static bool is_recording() { return current() != nullptr; }
  /// The operator that was last recorded or tried.
  [[nodiscard]] const std::string& last_operator() const { return last_operator_; }

  /// The key under which operators are seen before anything else of LibTorch does something about them.
  static constexpr c10::DispatchKey key = Interception::key;

 private:
  using Stack = torch::jit::Stack;
  using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

  /// One-dimensional tensors up to this size get memory until the next operator, for `torch::tensor(std::vector)`,
  /// which writes its numbers itself. Afterwards it only serves to tell who writes there too late.
  static constexpr std::size_t largest_written = 64UL * 1024;
  static constexpr unsigned char untouched = 0xA5;
  struct Written {
    std::size_t memory = 0;
    std::vector<unsigned char> bytes;  // what the program sees
    std::vector<unsigned char> noted;  // what of it is on the tape
  };

  static InitTape*& current() {
    thread_local InitTape* tape = nullptr;
    return tape;
  }
  static void let_go(void* context) { delete static_cast<std::shared_ptr<InitTape>*>(context); }

  static void intercept() { Interception::add(Interception::Part::deferred_init, &InitTape::on_operator); }
  static bool on_operator(const c10::OperatorHandle& op, Stack* stack) {
    InitTape* tape = current();
    if (tape != nullptr) tape->record(op, *stack);
    return tape != nullptr;
  }

  // Recording.

  void record(const c10::OperatorHandle& op, Stack& stack) {
    last_operator_ = c10::toString(op.operator_name());
    note_written();
    const auto& schema = op.schema();
    const std::size_t count = schema.arguments().size();
    const std::size_t base = stack.size() - count;
    bool on_tape = false;
    bool has_tensors = false;
    bool wants_device = false;
    for (std::size_t i = 0; i < count; ++i) {
      const c10::IValue& value = stack[base + i];
      for_each_tensor(value, [&](const at::Tensor& tensor) {
        has_tensors = true;
        if (place_of(tensor)) on_tape = true;
      });
      if (value.isGenerator() && value.toGenerator() != at::detail::getDefaultCPUGenerator()) {
        tape_operator::refuse(op,
                              "draws from a generator of the program's own: use the default one, torch::manual_seed");
      }
      if (value.isStorage()) tape_operator::refuse(op, "takes a storage, which cannot be recorded: use tensors");
      wants_device = wants_device || schema.arguments()[i].name() == "device";
    }
    const bool makes = has_tensors ? tape_operator::makes_from(op) : wants_device;
    const bool random = tape_operator::draws_random_numbers(op);
    if (!on_tape && !makes && !(random && has_tensors)) {  // on tensors from outside, which have values
      op.callBoxed(stack);
      return;
    }
    for (std::size_t i = 0; i < count; ++i) {
      if (!tape_operator::writes(op, i)) continue;
      for_each_tensor(stack[base + i], [&](const at::Tensor& tensor) {
        if (place_of(tensor)) return;
        tape_operator::refuse(op, "changes a tensor that was made outside: make it inside, or change it before");
      });
    }
    if (random) note_generator();

    TapeStep step{.op = op, .in_order = random, .default_dtype = c10::get_default_dtype()};
    const std::size_t known = memories_.size();
    for (std::size_t i = 0; i < count; ++i) {
      c10::IValue& value = stack[base + i];
      const std::string& name = schema.arguments()[i].name();
      step.arguments.push_back(recorded(op, value));
      if (name == "device" && (value.isDevice() || (value.isNone() && !has_tensors))) {
        step.arguments.back().value = value.isDevice() ? c10::IValue(at::Device(at::kCPU)) : c10::IValue();
        value = at::Device(at::kMeta);
      } else if (name == "pin_memory") {
        step.arguments.back().value = value = c10::IValue();
      } else if (name == "generator") {
        value = c10::IValue();
      } else {
        value = shadow(value);
      }
    }
    note_uses(step);
    note_overwritten(op, step);
    try {
      run(op, stack, has_tensors);
    } catch (const c10::Error& error) {
      stack.resize(base);
      if (!random && !tape_operator::writes_any(op) && evaluate(step, stack)) return;
      tape_operator::refuse(
          op,
          std::string("cannot be recorded, since it needs random or missing values or has no code for meta tensors: "
                      "do it after the module was materialised, or on tensors that were made outside (") +
              error.what_without_backtrace() + ")");
    }
    note_results(op, step, stack);
    if (random) mark_generator();
    const bool makes_memory = memories_.size() > known;
    const bool changes_values = !op.hasTag(at::Tag::inplace_view) && tape_operator::writes_any(op);
    // The rest makes memory alone, or another view of it.
    if (tape_operator::makes_empty(op) || !(random || changes_values || makes_memory)) return;
    note_uses(step);  // with what it made
    steps_.push_back(std::move(step));
  }

  /// Runs the operator for the shapes of its results. One that makes tensors out of nothing, but has no code for meta
  /// tensors (randperm), runs as it is, and only the shapes are kept.
  static void run(const c10::OperatorHandle& op, Stack& stack, bool has_tensors) {
    if (has_tensors) return op.callBoxed(stack);
    const auto count = static_cast<std::ptrdiff_t>(op.schema().arguments().size());
    const std::size_t others = stack.size() - static_cast<std::size_t>(count);
    Stack real(stack.end() - count, stack.end());
    try {
      op.callBoxed(stack);
    } catch (const c10::NotImplementedError&) {
      for (c10::IValue& value : real) {
        if (value.isDevice()) value = at::Device(at::kCPU);
      }
      at::Generator generator = at::detail::getDefaultCPUGenerator();
      const at::Tensor state = generator_state();
      op.callBoxed(real);
      {
        const std::scoped_lock lock(generator.mutex());
        generator.set_state(state);
      }
      stack.resize(others);
      for (const c10::IValue& value : real) stack.push_back(shadow(value));
    }
  }

  /// Runs an operator that needs values, if those that it needs depend on no random numbers: `linspace(...)[i].item()`.
  /// What it returns has values. (Not declared inline, which it is, since sources without init_replay.hpp have no
  /// definition of it.)
  bool evaluate(const TapeStep& step, Stack& stack) const;

  TapeArgument recorded(const c10::OperatorHandle& op, const c10::IValue& value) const {
    TapeArgument argument;
    const auto add = [&](const at::Tensor& tensor) {
      auto place = place_of(tensor);
      if (!place && tensor.defined() && tensor.is_meta())
        tape_operator::refuse(op, "takes a meta tensor that was made outside");
      if (place && (tensor.is_conj() || tensor.is_neg()))
        tape_operator::refuse(op, "takes a lazily conjugated tensor: resolve_conj()");
      argument.outside.push_back(place ? at::Tensor() : tensor);
      argument.versions.push_back(version_of(argument.outside.back()));
      argument.places.push_back(std::move(place));
    };
    if (value.isTensor()) {
      argument.kind = TapeArgument::Kind::tensor;
      add(value.toTensor());
    } else if (value.isTensorList()) {
      argument.kind = TapeArgument::Kind::tensors;
      for (const at::Tensor& tensor : value.toTensorVector()) add(tensor);
    } else if (value.isOptionalTensorList()) {
      argument.kind = TapeArgument::Kind::optional_tensors;
      for (const auto& tensor : value.toOptionalTensorVector()) add(tensor.value_or(at::Tensor()));
    } else {
      argument.value = value;
    }
    return argument;
  }

  void note_results(const c10::OperatorHandle& op, TapeStep& step, Stack& stack) {
    const std::size_t count = op.schema().returns().size();
    for (std::size_t i = stack.size() - count; i < stack.size(); ++i) {
      auto& places = step.results.emplace_back();
      const c10::IValue& value = stack[i];
      for_each_tensor(value, [&](const at::Tensor& tensor) {
        if (!tensor.is_meta() || !tensor.has_storage())
          tape_operator::refuse(op, "makes a tensor without strided memory");
        adopt(op, tensor);
        places.push_back(place_of(tensor));
      });
    }
  }

  /// Takes a new storage under this tape's numbers, and remembers the tensor.
  void adopt(const c10::OperatorHandle& op, const at::Tensor& tensor) {
    c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
    auto [found, is_new] = numbers_.try_emplace(storage, memories_.size());
    if (is_new) {
      memories_.push_back({tensor.storage().getWeakStorageImpl(), storage->nbytes()});
      if (tape_operator::makes_empty(op) && tensor.dim() == 1 && storage->nbytes() > 0 &&
          storage->nbytes() <= largest_written) {
        lend(found->second, *storage);
      } else {
        own(*storage, nullptr);
      }
    }
    Memory& memory = memories_[found->second];
    memory.bytes = std::max(memory.bytes, storage->nbytes());
    if (live_seen_.insert(tensor.unsafeGetTensorImpl()).second) {
      live_.emplace_back(tensor.getIntrusivePtr());
    }
  }
  /// Lets the storage keep the tape alive.
  void own(c10::StorageImpl& storage, void* data) {
    storage.set_data_ptr_noswap(
        at::DataPtr(data, new std::shared_ptr<InitTape>(shared_from_this()), &InitTape::let_go, at::Device(at::kMeta)));
  }
  void lend(std::size_t memory, c10::StorageImpl& storage) {
    written_.push_back({memory, std::vector<unsigned char>(storage.nbytes(), untouched), {}});
    own(storage, written_.back().bytes.data());
  }

  static void note_uses(TapeStep& step) {
    const auto add = [](std::vector<std::size_t>& memories, const std::optional<TapePlace>& place) {
      if (place && std::find(memories.begin(), memories.end(), place->memory) == memories.end()) {
        memories.push_back(place->memory);
      }
    };
    for (std::size_t i = 0; i < step.arguments.size(); ++i) {
      for (const auto& place : step.arguments[i].places) {
        add(step.memories, place);
        if (tape_operator::writes(*step.op, i)) add(step.written, place);
      }
    }
    for (const auto& result : step.results) {
      for (const auto& place : result) {
        add(step.memories, place);
        add(step.written, place);
      }
    }
  }
  void note_overwritten(const c10::OperatorHandle& op, TapeStep& step) const {
    if (!tape_operator::overwrites_all(op) || step.arguments[0].places.size() != 1 || !step.arguments[0].places[0])
      return;
    const TapePlace& self = *step.arguments[0].places[0];
    for (std::size_t i = 1; i < step.arguments.size(); ++i) {
      for (const auto& place : step.arguments[i].places) {
        if (place && place->memory == self.memory) return;
      }
    }
    const at::Tensor meta = at::empty_strided(self.sizes, self.strides, at::device(at::kMeta).dtype(self.dtype));
    const std::size_t bytes = static_cast<std::size_t>(meta.numel()) * meta.element_size();
    if (self.offset == 0 && meta.is_non_overlapping_and_dense() && bytes == memories_[self.memory].bytes) {
      step.overwrites = self.memory;
    }
  }

  /// What the program wrote into the memory that it was lent since the last operator.
  void note_written() {
    for (; lent_ < written_.size(); ++lent_) {
      Written& written = written_[lent_];
      written.noted = written.bytes;
      Memory& memory = memories_[written.memory];
      if (const auto storage = memory.storage.lock()) own(*storage, nullptr);
      if (std::all_of(written.bytes.begin(), written.bytes.end(), [](unsigned char b) { return b == untouched; }))
        continue;
      at::Tensor bytes = at::empty({static_cast<int64_t>(written.bytes.size())}, at::kByte);
      std::memcpy(bytes.data_ptr(), written.bytes.data(), written.bytes.size());
      steps_.push_back({.memories = {written.memory},
                        .written = {written.memory},
                        .overwrites = written.memory,
                        .bytes = std::move(bytes)});
    }
  }

  /// Puts on the tape that the program seeded the default generator, or the state in which it was at first. Nothing is
  /// drawn while recording, but after each operator that would, `mark_generator` moves the generator on: so that a
  /// state other than that one is the program's doing, the same seed again included.
  void note_generator() {
    const c10::impl::ExcludeDispatchKeyGuard below(key);
    at::Tensor state = generator_state();
    if (expected_state_.defined() && state.equal(expected_state_)) return;
    expected_state_ = state;
    steps_.push_back({.in_order = true, .generator_state = std::move(state)});
  }
  void mark_generator() {
    at::Generator generator = at::detail::getDefaultCPUGenerator();
    {
      const std::scoped_lock lock(generator.mutex());
      at::check_generator<at::CPUGeneratorImpl>(generator)->random();
    }
    expected_state_ = generator_state();
  }
  void finish() {
    const c10::impl::ExcludeDispatchKeyGuard below(key);
    note_written();
    for (const Written& written : written_) {
      if (written.bytes != written.noted) {
        throw Error(
            "fabric: deferred_init: the program wrote into a tensor's memory by data_ptr or an accessor, after other "
            "operators had run: fill tensors by operators, or make this one outside");
      }
    }
    written_ = {};
    live_seen_ = {};
    std::erase_if(live_, [](const WeakTensor& live) { return live.expired(); });
  }

  std::vector<TapeStep> steps_;
  std::vector<Memory> memories_;
  std::unordered_map<const c10::StorageImpl*, std::size_t> numbers_;
  std::vector<WeakTensor> live_;
  std::unordered_set<const c10::TensorImpl*> live_seen_;
  std::vector<Written> written_;
  std::size_t lent_ = 0;
  at::Tensor expected_state_;
  std::string last_operator_;
  std::string problem_;
};

}  // namespace fabric::detail
