// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fabric/connector/stages/state.hpp"

namespace fabric::detail {

/// Can this precision be carried out by that engine at all, and is the engine here?
constexpr Problem check_precision_object(const PrecisionObject& object, const Host& host) {
  const PrecisionKind kind = object.facts.kind;
  const auto unsupported = [&](Code code) { return Problem(code, "precision", in_quotes(object.facts.flag)); };
  switch (object.engine) {
    case PrecisionEngine::mixed:
      if (!is_mixed(object.facts)) return unsupported(Code::amp_precision_unsupported);
      break;
    case PrecisionEngine::fsdp:
      if (!half_or_full(object.facts)) return unsupported(Code::fsdp_precision_unsupported);
      break;
    case PrecisionEngine::deepspeed:
      if (!half_or_full(object.facts)) return unsupported(Code::deepspeed_precision_unsupported);
      break;
    case PrecisionEngine::xla:
      if (!host.xla_engine) return {Code::missing_torch_xla, "precision"};
      if (!half_or_full(object.facts) || is_mixed(object.facts)) return unsupported(Code::xla_precision_unsupported);
      break;
    case PrecisionEngine::transformer_engine:
      if (!host.transformer_engine) return {Code::missing_transformer_engine, "precision"};
      break;
    case PrecisionEngine::bitsandbytes: {
      if (!host.bitsandbytes_engine) return {Code::missing_bitsandbytes, "precision"};
      const bool int8 = object.facts.quantisation == BitsandbytesMode::int8 ||
                        object.facts.quantisation == BitsandbytesMode::int8_training;
      if (kind == PrecisionKind::bitsandbytes && int8 && object.facts.compute != Scalar::f16) {
        return {Code::bnb_int8_dtype, "precision",
                object.facts.quantisation == BitsandbytesMode::int8 ? "int8" : "int8-training"};
      }
      break;
    }
    default: break;
  }
  return {};
}

constexpr Problem check_environment_object(const EnvironmentObject& object, const Variables& variables,
                                           const Host& host) {
  if (!object.given() || object.facts.kind == EnvironmentKind::custom) return {};
  return construct_environment(object.facts.kind, variables, host).problem;
}

constexpr Problem check_checkpoint_object(CheckpointKind kind, const Host& host) {
  if (kind == CheckpointKind::xla && !host.xla_engine) return {Code::missing_torch_xla, "plugins"};
  return {};
}

/// The precision class that a strategy insists on, if it does.
constexpr Code precision_type_problem(const StrategyFacts& strategy, PrecisionEngine engine) {
  switch (strategy.family) {
    case StrategyFamily::fsdp: return engine != PrecisionEngine::fsdp ? Code::fsdp_precision_type : Code::none;
    case StrategyFamily::xla:
    case StrategyFamily::single_device_xla:
      return engine != PrecisionEngine::xla ? Code::xla_precision_type : Code::none;
    case StrategyFamily::xla_fsdp: return engine != PrecisionEngine::xla ? Code::xla_fsdp_precision_type : Code::none;
    default: return Code::none;
  }
}

/// Is the engine of that strategy here?
constexpr Code missing_engine(const StrategyFacts& strategy, const Host& host) {
  if (strategy.family == StrategyFamily::deepspeed && !host.deepspeed_engine) return Code::missing_deepspeed;
  if (is_xla(strategy) && !host.xla_engine) return Code::missing_torch_xla;
  return Code::none;
}

constexpr Problem check_strategy_object(const StrategyObject& object, const Variables& variables, const Host& host) {
  if (object.has_accelerator && object.accelerator.device == DeviceType::xla && !host.xla_engine) {
    return {Code::missing_torch_xla, "strategy"};
  }
  if (object.has_precision) {
    if (const Problem p = check_precision_object(object.precision, host); p.code != Code::none) return p;
  }
  if (const Problem p = check_checkpoint_object(object.checkpoint, host); p.code != Code::none) return p;
  if (const Problem p = check_environment_object(object.environment, variables, host); p.code != Code::none) return p;
  if (object.facts.family == StrategyFamily::deepspeed && object.checkpoint != CheckpointKind::none) {
    return {Code::unexpected_kwarg, "strategy", "checkpoint_io"};
  }
  if (const Code code = missing_engine(object.facts, host); code != Code::none) return {code, "strategy"};
  if (object.has_precision) {
    const Code code = precision_type_problem(object.facts, object.precision.engine);
    if (code != Code::none) return {code, "strategy"};
  }
  return {};
}

/// The scaler of half-precision gradients works on GPUs and XLA devices only.
constexpr bool scaler_is_idle(const PrecisionObject& precision, const Host& host) {
  const bool for_gpus = precision.engine == PrecisionEngine::fsdp ||
                        (precision.engine == PrecisionEngine::mixed && precision.device == DeviceType::cuda);
  return for_gpus && precision.facts.kind == PrecisionKind::f16_mixed && host.cuda_devices == 0 && !host.xla_engine;
}

/// Stage user: the objects that the program made must be possible by themselves.
constexpr void check_objects(State& state) {
  const auto keep = [&](const Problem& problem) {
    if (problem.code != Code::none) state.refuse(problem);
  };
  const Flags& flags = state.flags;
  const auto note_idle_scaler = [&](const PrecisionObject& object) {
    if (scaler_is_idle(object, state.host)) state.note(Note::scaler_disabled_no_cuda);
  };
  const auto note_srun = [&](const EnvironmentObject& object) {
    if (object.facts.kind == EnvironmentKind::slurm && srun_not_used(state.variables, state.host)) {
      state.note(Note::srun_not_used);
    }
  };
  if (flags.strategy.is_object) {
    if (flags.strategy.object.has_precision) note_idle_scaler(flags.strategy.object.precision);
    note_srun(flags.strategy.object.environment);
  }
  if (flags.strategy.is_object) keep(check_strategy_object(flags.strategy.object, state.variables, state.host));
  if (flags.accelerator.is_object && flags.accelerator.facts.device == DeviceType::xla && !state.host.xla_engine) {
    keep({Code::missing_torch_xla, "accelerator"});
  }
  for (const Plugin& plugin : flags.plugins) {
    switch (plugin.kind) {
      case Plugin::Kind::precision:
        keep(check_precision_object(plugin.precision, state.host));
        note_idle_scaler(plugin.precision);
        break;
      case Plugin::Kind::checkpoint: keep(check_checkpoint_object(plugin.checkpoint, state.host)); break;
      case Plugin::Kind::environment:
        note_srun(plugin.environment);
        keep(check_environment_object(plugin.environment, state.variables, state.host));
        break;
    }
  }
}

}  // namespace fabric::detail
