// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include <torch/library.h>

namespace fabric::detail {

/// The dispatch keys of a tensor, which LibTorch keeps to itself and those that derive from it.
inline c10::DispatchKeySet& keys_of(const at::Tensor& tensor) {
  struct Access : c10::TensorImpl {
    static c10::DispatchKeySet& keys(c10::TensorImpl& impl) { return impl.*(&Access::key_set_); }
  };
  return Access::keys(*tensor.unsafeGetTensorImpl());
}

/// The parts of this library that must see an operator before LibTorch does something about it, below one dispatch key,
/// for which there can be only one fallback in a program. The key is put on tensors, or on a thread by a guard; where
/// it is on neither, it costs nothing.
class Interception {
 public:
  /// Left to tests by LibTorch, above autograd and autocast.
  static constexpr c10::DispatchKey key = c10::DispatchKey::TESTING_ONLY_GenericWrapper;

  /// In the order in which they are asked.
  enum class Part : std::uint8_t { deferred_init, sharding };
  /// Does what there is to do, the operator itself included, below the key; or returns false.
  using Handler = bool (*)(const c10::OperatorHandle& op, torch::jit::Stack* stack);

  /// From here on, `handler` is asked.
  static void add(Part part, Handler handler) {
    handlers()[static_cast<std::size_t>(part)] = handler;
    static torch::Library fallback = [] {
      torch::Library library(torch::Library::IMPL, "_", key, __FILE__, __LINE__);
      library.fallback(torch::CppFunction::makeFromBoxedFunction<&Interception::on_operator>());
      return library;
    }();
    static_cast<void>(fallback);
  }

 private:
  static std::array<std::atomic<Handler>, 2>& handlers() {
    static std::array<std::atomic<Handler>, 2> all{};
    return all;
  }
  static void on_operator(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const c10::impl::ExcludeDispatchKeyGuard below(key);
    for (const auto& each : handlers()) {
      const Handler handler = each.load(std::memory_order_relaxed);
      if (handler != nullptr && handler(op, stack)) return;
    }
    op.callBoxed(stack);
  }
};

}  // namespace fabric::detail
