// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fabric/connector/stages/objects.hpp"
#include "fabric/connector/stages/state.hpp"

namespace fabric::detail {

/// The engine that carries a precision out under that strategy.
constexpr PrecisionEngine engine_under(const StrategyFacts& strategy, PrecisionKind kind) {
  switch (strategy.family) {
    case StrategyFamily::single_device_xla:
    case StrategyFamily::xla:
    case StrategyFamily::xla_fsdp: return PrecisionEngine::xla;
    case StrategyFamily::deepspeed: return PrecisionEngine::deepspeed;
    case StrategyFamily::fsdp: return PrecisionEngine::fsdp;
    default: return own_engine(kind);
  }
}

/// The rules that say which precisions a strategy has, and their codes.
struct PrecisionRule {
  RuleId rule;
  Code code;
};
inline constexpr PrecisionRule precision_rules[]{
    {RuleId::xla_has_true_precisions_only, Code::xla_precision_unsupported},
    {RuleId::deepspeed_has_no_such_precision, Code::deepspeed_precision_unsupported},
    {RuleId::fsdp_has_no_such_precision, Code::fsdp_precision_unsupported},
    {RuleId::model_parallel_has_no_such_precision, Code::model_parallel_precision_unsupported},
};

/// Stage precision: an object as it is; a value by what the strategy has, with a fallback on CPUs.
constexpr void init_precision(State& state) {
  Selection& out = state.out;
  if (state.precision_object) {
    out.precision = state.precision_object->facts;
    out.precision_engine = state.precision_object->engine;
    out.precision_device = state.precision_object->device;
    if (state.refused_by(RuleId::bitsandbytes_needs_cuda)) state.refuse(Problem(Code::bnb_needs_cuda, "plugins"));
    return;
  }
  const Combination chosen = state.combination();
  for (const PrecisionRule& rule : precision_rules) {
    if (rule_of(rule.rule).refuses(chosen)) {
      return state.refuse(Problem(rule.code, "precision", in_quotes(state.precision)));
    }
  }
  out.precision_engine = engine_under(out.strategy, out.precision.kind);
  out.precision_device = out.accelerator.device;
  if (out.precision_engine == PrecisionEngine::transformer_engine && !state.host.transformer_engine) {
    return state.refuse(Problem(Code::missing_transformer_engine, "precision"));
  }
  const bool autocast = out.precision_engine == PrecisionEngine::mixed;
  if (autocast && state.refused_by(RuleId::f16_autocast_needs_gpu)) {
    out.precision = BF16Mixed::facts;
    out.sources.precision = Source::fallback;
    state.note(Note::fp16_amp_cpu_to_bf16);
  }
  PrecisionObject settled{out.precision, out.precision_engine};
  settled.device = out.precision_device;
  if (scaler_is_idle(settled, state.host)) state.note(Note::scaler_disabled_no_cuda);
  if (autocast) state.note(out.precision.kind == PrecisionKind::f16_mixed ? Note::amp_fp16 : Note::amp_bf16);
}

}  // namespace fabric::detail
