// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

namespace fabric {

namespace detail {

template <class Block>
struct ImplOf {
  using type = Block;
};
template <class Impl>
struct ImplOf<torch::nn::ModuleHolder<Impl>> {
  using type = Impl;
};
template <class Block>
requires requires { typename Block::ContainedType; }
struct ImplOf<Block> {
  using type = typename Block::ContainedType;
};

}  // namespace detail

/// Which of the calls that a program marks by `recompute` are recomputed in backward, so that their inner activations
/// need no memory from forward until then. By default all of them.
class ActivationCheckpointing {
 public:
  constexpr ActivationCheckpointing() = default;

  /// All marked calls.
  [[nodiscard]] static constexpr ActivationCheckpointing marked() { return {}; }
  /// None: marks cost nothing, and all activations are kept.
  [[nodiscard]] static constexpr ActivationCheckpointing none() { return ActivationCheckpointing(&never); }
  /// Those of modules of these types (`Block` or `BlockImpl`) or derived from them: `of<Attention, Mlp>()`.
  template <class... Blocks>
  [[nodiscard]] static constexpr ActivationCheckpointing of() {
    static_assert(sizeof...(Blocks) > 0, "fabric: ActivationCheckpointing::of takes types of modules; see none()");
    static_assert((std::is_base_of_v<torch::nn::Module, typename detail::ImplOf<Blocks>::type> && ...),
                  "fabric: ActivationCheckpointing::of takes types of modules");
    return ActivationCheckpointing(&is_one_of<typename detail::ImplOf<Blocks>::type...>);
  }

  /// Is the call of `module`, or of a function that is no module (null), to be recomputed?
  [[nodiscard]] bool applies_to(const torch::nn::Module* module) const {
    return applies_ == nullptr || applies_(module);
  }
  friend constexpr bool operator==(const ActivationCheckpointing&, const ActivationCheckpointing&) = default;

 private:
  using Applies = bool (*)(const torch::nn::Module* module);
  constexpr explicit ActivationCheckpointing(Applies applies) : applies_(applies) {}

  static bool never(const torch::nn::Module* /*module*/) { return false; }
  template <class... Impls>
  static bool is_one_of(const torch::nn::Module* module) {
    return module != nullptr && ((dynamic_cast<const Impls*>(module) != nullptr) || ...);
  }

  Applies applies_ = nullptr;
};

namespace detail {

inline std::atomic<ActivationCheckpointing> process_activation_checkpointing{};

/// This thread's setting, if it has one of its own.
inline const ActivationCheckpointing*& thread_activation_checkpointing() {
  thread_local const ActivationCheckpointing* setting = nullptr;
  return setting;
}

/// How many recomputations this thread is in.
inline int& recomputations() {
  thread_local int depth = 0;
  return depth;
}

}  // namespace detail

/// Does this thread run a block again, for backward? What counts or prints in a forward may ask.
[[nodiscard]] inline bool is_recomputing() { return detail::recomputations() > 0; }

/// Sets for the process which marked calls are recomputed. To be called before the training begins.
inline void checkpoint_activations(ActivationCheckpointing setting) {
  detail::process_activation_checkpointing = setting;
}

/// While alive, on this thread, `setting` holds in place of the process's. May be nested.
class ActivationCheckpointingGuard {
 public:
  explicit ActivationCheckpointingGuard(ActivationCheckpointing setting)
      : setting_(setting), previous_(detail::thread_activation_checkpointing()) {
    detail::thread_activation_checkpointing() = &setting_;
  }
  ~ActivationCheckpointingGuard() { detail::thread_activation_checkpointing() = previous_; }
  ActivationCheckpointingGuard(const ActivationCheckpointingGuard&) = delete;
  ActivationCheckpointingGuard& operator=(const ActivationCheckpointingGuard&) = delete;

 private:
  ActivationCheckpointing setting_;
  const ActivationCheckpointing* previous_;
};

namespace detail {

[[nodiscard]] inline ActivationCheckpointing activation_checkpointing() {
  const ActivationCheckpointing* own = thread_activation_checkpointing();
  return own == nullptr ? process_activation_checkpointing.load() : *own;
}

}  // namespace detail
}  // namespace fabric
