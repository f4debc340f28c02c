// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "fabric/policy/accelerator.hpp"
#include "fabric/policy/environment.hpp"
#include "fabric/policy/precision.hpp"
#include "fabric/policy/strategy.hpp"

namespace fabric {

/// One choice of each kind: what a `Fabric` runs on.
struct Combination {
  AcceleratorFacts accelerator = Cpu::facts;
  StrategyFacts strategy = SingleDevice::facts;
  PrecisionFacts precision = F32::facts;
  EnvironmentFacts environment = Detected::facts;
};

/// Why a combination is refused. The names read as the start of a sentence, since compilers print them.
enum class RuleId : std::uint8_t {
  none,
  mps_drives_one_device,
  xla_strategy_needs_xla_accelerator,
  xla_accelerator_needs_xla_strategy,
  data_parallel_needs_gpus,
  fsdp_needs_gpus,
  mps_has_no_64_bit_floats,
  mps_has_no_fp8,
  f16_autocast_needs_gpu,
  bitsandbytes_needs_cuda,
  xla_has_true_precisions_only,
  deepspeed_has_no_such_precision,
  fsdp_has_no_such_precision,
  model_parallel_has_no_such_precision,
};

/// The choice that is best changed when a rule refuses a combination.
enum class Axis : std::uint8_t { accelerator, strategy, precision };

/// A rule refuses some combinations; `sentence` says why and what to use instead.
struct Rule {
  RuleId id;
  std::string_view code;
  Axis change;
  bool (*refuses)(const Combination&);
  std::string_view sentence;
};

namespace detail {

constexpr bool half_or_full(const PrecisionFacts& p) {
  return p.kind == PrecisionKind::f32 || p.kind == PrecisionKind::f16 || p.kind == PrecisionKind::bf16 || is_mixed(p);
}
constexpr bool is_custom(const PrecisionFacts& p) { return p.kind == PrecisionKind::custom; }
/// A precision that no `--precision` means: the module brings it along, so that most strategies take it.
constexpr bool is_plugin(const PrecisionFacts& p) { return is_custom(p) || p.kind == PrecisionKind::bitsandbytes; }

}  // namespace detail

/// The one table of incompatibilities: the static_asserts of `Fabric`, the concept `CompatibleWith`, the menu's filter,
/// the resolver and the compatibility matrix in the documentation all read it. The first rule that refuses is reported.
inline constexpr std::array rules{
    Rule{RuleId::mps_drives_one_device, "mps_drives_one_device", Axis::strategy,
         [](const Combination& c) { return c.accelerator.device == DeviceType::mps && is_parallel(c.strategy); },
         "Mps drives exactly one device: use SingleDevice with Mps, or Cpu or Cuda with this strategy"},
    Rule{RuleId::xla_strategy_needs_xla_accelerator, "xla_strategy_needs_xla_accelerator", Axis::strategy,
         [](const Combination& c) { return is_xla(c.strategy) && c.accelerator.device != DeviceType::xla; },
         "XLA strategies drive XLA devices only: use Xla, or Ddp instead of XlaDdp and Fsdp instead of XlaFsdp"},
    Rule{RuleId::xla_accelerator_needs_xla_strategy, "xla_accelerator_needs_xla_strategy", Axis::strategy,
         [](const Combination& c) { return c.accelerator.device == DeviceType::xla && !is_xla(c.strategy); },
         "Xla needs one of SingleDeviceXla, XlaDdp and XlaFsdp"},
    Rule{RuleId::data_parallel_needs_gpus, "data_parallel_needs_gpus", Axis::strategy,
         [](const Combination& c) {
           return c.strategy.family == StrategyFamily::data_parallel && c.accelerator.device == DeviceType::cpu;
         },
         "DataParallel replicates over GPUs: use Ddp on Cpu"},
    Rule{RuleId::fsdp_needs_gpus, "fsdp_needs_gpus", Axis::strategy,
         [](const Combination& c) {
           return c.strategy.family == StrategyFamily::fsdp && c.strategy.built_in &&
                  c.accelerator.device != DeviceType::cuda;
         },
         "Fsdp shards over GPUs: use Cuda, or Ddp on Cpu"},
    Rule{RuleId::mps_has_no_64_bit_floats, "mps_has_no_64_bit_floats", Axis::precision,
         [](const Combination& c) {
           return c.accelerator.device == DeviceType::mps && c.precision.kind == PrecisionKind::f64;
         },
         "Mps has no 64-bit floats: use F32, or F64 on Cpu"},
    Rule{RuleId::mps_has_no_fp8, "mps_has_no_fp8", Axis::precision,
         [](const Combination& c) {
           return c.accelerator.device == DeviceType::mps && c.precision.kind == PrecisionKind::transformer_engine;
         },
         "Mps has no FP8: use BF16Mixed, or TransformerEngine on Cuda or Cpu"},
    Rule{RuleId::f16_autocast_needs_gpu, "f16_autocast_needs_gpu", Axis::precision,
         [](const Combination& c) {
           return c.accelerator.device == DeviceType::cpu && c.precision.kind == PrecisionKind::f16_mixed &&
                  c.strategy.family != StrategyFamily::deepspeed;
         },
         "autocast to half floats needs a GPU: use BF16Mixed on Cpu"},
    Rule{RuleId::bitsandbytes_needs_cuda, "bitsandbytes_needs_cuda", Axis::accelerator,
         [](const Combination& c) {
           return c.precision.kind == PrecisionKind::bitsandbytes && c.accelerator.device != DeviceType::cuda;
         },
         "Bitsandbytes needs Cuda"},
    Rule{RuleId::xla_has_true_precisions_only, "xla_has_true_precisions_only", Axis::precision,
         [](const Combination& c) {
           const auto kind = c.precision.kind;
           return is_xla(c.strategy) && !detail::is_custom(c.precision) && kind != PrecisionKind::f32 &&
                  kind != PrecisionKind::f16 && kind != PrecisionKind::bf16;
         },
         "XLA strategies have the precisions F32, F16 and BF16"},
    Rule{RuleId::deepspeed_has_no_such_precision, "deepspeed_has_no_such_precision", Axis::precision,
         [](const Combination& c) {
           return c.strategy.family == StrategyFamily::deepspeed && !detail::is_plugin(c.precision) &&
                  !detail::half_or_full(c.precision);
         },
         "DeepSpeed has the precisions F32, F16, BF16, F16Mixed and BF16Mixed"},
    Rule{RuleId::fsdp_has_no_such_precision, "fsdp_has_no_such_precision", Axis::precision,
         [](const Combination& c) {
           return c.strategy.family == StrategyFamily::fsdp && !detail::is_custom(c.precision) &&
                  !detail::half_or_full(c.precision);
         },
         "Fsdp has the precisions F32, F16, BF16, F16Mixed and BF16Mixed"},
    Rule{RuleId::model_parallel_has_no_such_precision, "model_parallel_has_no_such_precision", Axis::precision,
         [](const Combination& c) {
           return c.strategy.family == StrategyFamily::model_parallel && !detail::is_plugin(c.precision) &&
                  (!detail::half_or_full(c.precision) || c.precision.kind == PrecisionKind::f16_mixed);
         },
         "ModelParallel has the precisions F32, F16, BF16 and BF16Mixed"},
};

/// The first rule that refuses `c`, or `RuleId::none`.
[[nodiscard]] constexpr RuleId first_refusal(const Combination& c) {
  for (const Rule& rule : rules) {
    if (rule.refuses(c)) return rule.id;
  }
  return RuleId::none;
}

/// The rule of that id, for its sentence. `id` is not `RuleId::none`.
[[nodiscard]] constexpr const Rule& rule_of(RuleId id) {
  for (const Rule& rule : rules) {
    if (rule.id == id) return rule;
  }
  throw "fabric: RuleId::none has no rule";
}

/// The combination that four policy types name.
template <AcceleratorPolicy A, StrategyPolicy S, PrecisionPolicy P, EnvironmentPolicy E = Detected>
inline constexpr Combination combination_v{A::facts, S::facts, P::facts, E::facts};

/// Do these policies go together?
template <class A, class S, class P, class E = Detected>
concept CompatibleWith = AcceleratorPolicy<A> && StrategyPolicy<S> && PrecisionPolicy<P> && EnvironmentPolicy<E> &&
    first_refusal(combination_v<A, S, P, E>)
== RuleId::none;

}  // namespace fabric
