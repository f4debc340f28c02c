// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>

#include <torch/nn/module.h>

#include "fabric/policy/strategy_precision.hpp"
#include "fabric/precision/autocast.hpp"
#include "fabric/precision/grad_scaler.hpp"
#include "fabric/precision/precision_plugin.hpp"

namespace fabric {

/// What a precision does under a strategy that shards: the conversions that `strategy_precision` says. The module's own
/// dtypes are the engine's business, which keeps exact masters and whole parameters for computing.
template <class S, class P>
class ShardedPrecision {
 public:
  /// The dtypes of this pair.
  static constexpr StrategyPrecision traits = strategy_precision_v<S, P>;
  static constexpr bool has_scaler = traits.scaling != GradientScaling::none;

  /// Is the loss scaled by the strategy's own rule?
  static constexpr bool scales_by_itself = traits.scaling == GradientScaling::engine;

  /// What may be chosen at run time: of the scaling of the loss, if there is any.
  using Options = std::conditional_t<scales_by_itself, DynamicLossScale,
                                     std::conditional_t<has_scaler, GradScalerOptions, NoOptions>>;
  /// DeepSpeed's loss scale, as a `GradScaler` does it.
  static GradScalerOptions scaler_options(const DynamicLossScale& options) requires scales_by_itself {
    const bool is_fixed = options.loss_scale > 0;
    const double first = is_fixed ? options.loss_scale : std::ldexp(1.0, options.initial_scale_power);
    return {.init_scale = first,
            .growth_interval = is_fixed ? std::numeric_limits<std::int32_t>::max() : options.loss_scale_window,
            .hysteresis = options.hysteresis,
            .min_scale = is_fixed ? first : options.min_loss_scale};
  }
  /// The default dtype while a module is made.
  struct InitContext : DefaultDtypeGuard {
    InitContext() : DefaultDtypeGuard(dtype_of(traits.init)) {}
  };
  /// Autocast, if the strategy has it, in the default dtype of forward.
  class ForwardContext {
   public:
    explicit ForwardContext(at::DeviceType device) : dtype_(dtype_of(traits.forward)) {
      if constexpr (traits.autocast.has_value()) autocast_.emplace(device, dtype_of(*traits.autocast));
    }

   private:
    DefaultDtypeGuard dtype_;
    std::optional<AutocastGuard> autocast_{};
  };

  /// Nothing: the engine converts what it gathers.
  static void convert_module(torch::nn::Module& /*module*/) {}
  /// A tree with its floating-point tensors as forward takes them.
  template <class T>
  static auto convert_input(T&& value) {
    if constexpr (traits.input.has_value()) {
      return detail::cast_floats(std::forward<T>(value), dtype_of(*traits.input));
    } else {
      return tree::Bare<T>(std::forward<T>(value));
    }
  }
  /// Likewise as the loop gets them.
  template <class T>
  static auto convert_output(T&& value) {
    if constexpr (traits.converts_output) {
      return detail::cast_floats(std::forward<T>(value), detail::default_dtype());
    } else {
      return tree::Bare<T>(std::forward<T>(value));
    }
  }
  static void after_step() { at::autocast::clear_cache(); }
};

}  // namespace fabric
