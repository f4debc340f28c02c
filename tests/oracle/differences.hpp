// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "fabric/config.hpp"

// The kinds of rows whose answer differs from the reference on purpose; docs/differences.md gives the reasons. Each
// kind is a condition on the row alone: what it asks for, and that none of the stages before the named one refuses it.

namespace oracle {

/// The kind of difference that flags, variables and host show, or nothing.
inline std::string difference_of(const fabric::Flags& flags, const fabric::Variables& variables,
                                 const fabric::Host& host) {
  using namespace fabric;
  Resolution out;
  detail::State state{flags, variables, host, built_in_registry, out};
  detail::check_objects(state);
  if (!state.good()) return {};
  detail::merge_variables(state);
  if (!state.good()) return {};
  detail::check_flags(state);
  if (!state.strategy_object && state.strategy.find("find_unused_parameters") != std::string_view::npos &&
      state.strategy != DdpFindUnusedParameters::facts.flag) {
    return "find_unused_parameters_of_each_kind";
  }
  if (!state.good()) return {};

  const detail::Maybe<AcceleratorFacts> accelerator = state.accelerator_object;
  const detail::Maybe<StrategyObject> strategy = state.strategy_object;
  if (strategy && accelerator && strategy->devices.count > 0 && strategy->devices.type == accelerator->device &&
      (accelerator->device == DeviceType::cpu || accelerator->device == DeviceType::cuda)) {
    return "strategy_devices_of_the_accelerator_objects_kind";
  }

  detail::check_counts(state);
  if (state.good()) detail::choose_accelerator(state);
  if (state.good()) detail::init_accelerator(state);
  if (!state.good()) return {};
  const detail::AnyEnvironment environment = detail::choose_environment(state);
  if (!state.good()) return {};
  const DeviceType device = out.accelerator.device;
  if (state.strategy == "dp" && accelerator && device == DeviceType::cpu) {
    return "dp_with_a_cpu_accelerator_object";
  }
  detail::settle_strategy(state);
  if (!state.good()) return {};
  if (out.strategy.family == StrategyFamily::fsdp && out.strategy.built_in && accelerator) {
    return "fsdp_with_a_cuda_accelerator_object";
  }
  if (state.strategy == "single_xla" || state.strategy == "single_tpu") return "single_xla_by_name";

  detail::init_strategy(state);
  if (!state.good()) return {};
  const bool half = out.precision.kind == PrecisionKind::f16_mixed;
  detail::init_precision(state);
  if (!state.good()) return {};
  const bool autocast_elsewhere = accelerator && device != DeviceType::cuda &&
                                  out.precision_engine == PrecisionEngine::mixed && !state.precision_object;
  if (autocast_elsewhere && half && device == DeviceType::cpu && rank_for_messages(variables) == 0) {
    return "autocast_with_an_accelerator_object";
  }
  detail::give_to_strategy(state);
  if (state.good()) detail::launch_strategy(state, environment);
  if (!state.good()) return {};

  if (autocast_elsewhere) return "autocast_with_an_accelerator_object";
  if (is_xla(out.strategy) && device != DeviceType::xla) return "xla_strategy_on_another_accelerator";
  if (device == DeviceType::mps && is_parallel(out.strategy)) return "apple_gpu_on_several_nodes";
  if (out.strategy.family == StrategyFamily::data_parallel && device == DeviceType::cpu) {
    return "data_parallel_object_on_cpu";
  }
  if (device == DeviceType::mps && out.precision.kind == PrecisionKind::f64) return "f64_on_an_apple_gpu";
  if (device == DeviceType::mps && out.precision.kind == PrecisionKind::transformer_engine) {
    return "fp8_on_an_apple_gpu";
  }
  return {};
}

}  // namespace oracle
