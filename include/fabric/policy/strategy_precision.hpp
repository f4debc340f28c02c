// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>

#include "fabric/policy/precision.hpp"
#include "fabric/policy/strategy.hpp"
#include "fabric/policy/text.hpp"

namespace fabric {

/// Who scales losses and gradients so that half floats can hold them.
enum class GradientScaling : std::uint8_t {
  none,
  scaler,          ///< A `GradScaler`; each rank sees all gradients.
  sharded_scaler,  ///< A `GradScaler`; each rank sees a part, so that overflow is only known when all have looked.
  engine,          ///< The strategy's own, by `DynamicLossScale`.
};

/// The dtypes that a precision comes to under a strategy: sharding strategies store, communicate and compute in types
/// of their own. Where a dtype is missing, nothing is converted.
struct StrategyPrecision {
  std::optional<Scalar> module;    ///< What parameters and floating-point buffers are converted to at setup.
  Scalar init = Scalar::f32;       ///< The default dtype while a module is made,
  Scalar forward = Scalar::f32;    ///< and while it runs.
  std::optional<Scalar> autocast;  ///< What autocast computes in while it runs.
  std::optional<Scalar> input;     ///< What floating-point inputs are converted to.
  bool converts_output = false;    ///< Floating-point outputs come back in the default dtype.
  Scalar compute = Scalar::f32;    ///< Of parameters that were gathered from shards, and of what is computed with them.
  Scalar reduce = Scalar::f32;     ///< Of gradients on their way between ranks.
  Scalar buffers = Scalar::f32;    ///< Of floating-point buffers in forward.
  GradientScaling scaling = GradientScaling::none;
  Name variable;  ///< The environment variable, if any, that tells the device's compiler about the precision.

  friend constexpr bool operator==(const StrategyPrecision&, const StrategyPrecision&) = default;
};

/// How an engine that scales by itself does it: DeepSpeed's dynamic loss scale.
struct DynamicLossScale {
  double loss_scale = 0;                  ///< A fixed factor, or 0 for one that adapts.
  int initial_scale_power = 16;           ///< The first factor is 2 to this.
  std::int64_t loss_scale_window = 1000;  ///< The factor doubles after so many good steps.
  int hysteresis = 2;                     ///< It halves at the second overflow since it last grew.
  double min_loss_scale = 1;              ///< It never gets smaller.
};

namespace detail {

constexpr bool in_half_floats(const PrecisionFacts& p) {
  return p.kind == PrecisionKind::f16 || p.kind == PrecisionKind::f16_mixed;
}

/// On one device or with a replica on each: what the precision itself does.
constexpr StrategyPrecision plain_precision(const PrecisionFacts& p) {
  StrategyPrecision s;
  s.compute = p.compute;
  s.reduce = s.buffers = p.parameters;
  switch (p.kind) {
    case PrecisionKind::f32:
    case PrecisionKind::custom: return s;
    case PrecisionKind::f16_mixed:
    case PrecisionKind::bf16_mixed:
      s.autocast = p.compute;
      s.scaling = in_half_floats(p) ? GradientScaling::scaler : GradientScaling::none;
      break;
    case PrecisionKind::f64:
    case PrecisionKind::f16:
    case PrecisionKind::bf16: s.module = s.init = s.forward = p.parameters; break;
    case PrecisionKind::transformer_engine:
      s.module = s.init = s.forward = p.parameters;
      s.autocast = p.compute;
      break;
    case PrecisionKind::bitsandbytes: s.init = s.forward = p.parameters; break;  // linear layers are quantised instead
  }
  s.input = p.compute;
  s.converts_output = true;
  return s;
}

/// Parameters are gathered, and gradients reduced, in the precision's compute type.
constexpr StrategyPrecision fsdp_precision(const PrecisionFacts& p) {
  StrategyPrecision s;
  s.init = s.forward = p.parameters;
  s.input = p.parameters;
  s.converts_output = true;
  s.compute = s.reduce = s.buffers = p.compute;
  if (is_mixed(p)) {
    s.autocast = p.compute;
    s.scaling = in_half_floats(p) ? GradientScaling::sharded_scaler : GradientScaling::none;
  } else {
    s.module = p.parameters;
  }
  return s;
}

/// Autocast, and parameters that are gathered in what it computes in; buffers too, since operators take both in one
/// type.
constexpr StrategyPrecision model_parallel_precision(const PrecisionFacts& p) {
  StrategyPrecision s = plain_precision(p);
  if (is_mixed(p)) s.buffers = p.compute;
  return s;
}

/// The engine keeps 32-bit copies and scales by itself; forward sees inputs, parameters and buffers in the compute
/// type, and no autocast.
constexpr StrategyPrecision deepspeed_precision(const PrecisionFacts& p) {
  StrategyPrecision s;
  s.init = p.parameters;
  if (!is_mixed(p)) s.module = p.parameters;
  s.input = p.compute;
  s.converts_output = true;
  s.compute = s.reduce = s.buffers = p.compute;
  s.scaling = in_half_floats(p) ? GradientScaling::engine : GradientScaling::none;
  return s;
}

/// Tensors stay in 32 bits for the program; the device's compiler replaces their type.
constexpr StrategyPrecision xla_precision(const PrecisionFacts& p) {
  StrategyPrecision s;
  s.compute = s.reduce = s.buffers = p.compute;
  if (p.kind == PrecisionKind::f16) s.variable = "XLA_USE_F16";
  if (p.kind == PrecisionKind::bf16) s.variable = "XLA_USE_BF16";
  return s;
}

}  // namespace detail

/// What `precision` comes to under `strategy`. Meant for combinations that no rule refuses.
[[nodiscard]] constexpr StrategyPrecision strategy_precision(const StrategyFacts& strategy,
                                                             const PrecisionFacts& precision) {
  const bool own = precision.kind == PrecisionKind::custom || precision.kind == PrecisionKind::bitsandbytes;
  if (own) return detail::plain_precision(precision);  // the module brings it along
  switch (strategy.family) {
    case StrategyFamily::fsdp: return detail::fsdp_precision(precision);
    case StrategyFamily::deepspeed: return detail::deepspeed_precision(precision);
    case StrategyFamily::model_parallel: return detail::model_parallel_precision(precision);
    case StrategyFamily::single_device_xla:
    case StrategyFamily::xla:
    case StrategyFamily::xla_fsdp: return detail::xla_precision(precision);
    default: return detail::plain_precision(precision);
  }
}

/// Likewise for policy types.
template <StrategyPolicy S, PrecisionPolicy P>
inline constexpr StrategyPrecision strategy_precision_v = strategy_precision(S::facts, P::facts);

static_assert(strategy_precision_v<Fsdp, F16Mixed>.scaling == GradientScaling::sharded_scaler);

}  // namespace fabric
