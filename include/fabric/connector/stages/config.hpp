// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>

#include "fabric/connector/stages/state.hpp"

namespace fabric::detail {

/// A value of `--precision` and the policy it means.
struct PrecisionEntry {
  std::string_view flag;
  const PrecisionFacts* facts;
  bool discouraged = false;  ///< An alias that leaves open whether the weights are 16 bits wide.
};

inline constexpr std::array<PrecisionEntry, 12> precision_entries{
    {{"32-true", &F32::facts},
     {"64-true", &F64::facts},
     {"16-true", &F16::facts},
     {"bf16-true", &BF16::facts},
     {"16-mixed", &F16Mixed::facts},
     {"bf16-mixed", &BF16Mixed::facts},
     {"transformer-engine", &TransformerEngine<>::facts},
     {"transformer-engine-float16", &TransformerEngine<F16>::facts},
     {"32", &F32::facts},
     {"64", &F64::facts},
     {"16", &F16Mixed::facts, true},
     {"bf16", &BF16Mixed::facts, true}}};

constexpr void check_strategy_name(State& state) {
  if (state.strategy_object) {
    state.out.strategy = state.strategy_object->facts;
    state.out.options = state.strategy_object->options;
    return;
  }
  for (const char c : state.strategy) {
    const char l = lower(c);
    state.lowered.append(std::string_view(&l, 1));
  }
  state.strategy = state.lowered;
  if (state.strategy == "auto") return;
  if (const std::size_t place = state.registry.find_strategy(state.strategy); place < state.registry.strategy_count) {
    state.out.strategy = *state.registry.strategies[place].facts;
    return;
  }
  Nearest nearest(state.strategy);
  nearest.consider("auto");
  for (std::size_t i = 0; i < state.registry.strategy_count; ++i) nearest.consider(state.registry.strategies[i].flag);
  Problem problem(Code::invalid_strategy_name, "strategy", in_quotes(state.strategy));
  problem.nearest = nearest.best;
  state.refuse(problem);
}

constexpr void check_accelerator_name(State& state) {
  if (state.accelerator_object || state.accelerator == "auto" || state.accelerator == "gpu") return;
  if (state.registry.has_accelerator(state.accelerator)) return;
  Nearest nearest(state.accelerator);
  nearest.consider("auto");
  nearest.consider("gpu");
  for (std::size_t i = 0; i < state.registry.accelerator_count; ++i) {
    nearest.consider(state.registry.accelerators[i].flag);
  }
  Problem problem(Code::invalid_accelerator_name, "accelerator", in_quotes(state.accelerator));
  problem.nearest = nearest.best;
  state.refuse(problem);
}

/// The Apple GPU is a single device. The letters "dp" in a name mean several.
constexpr void check_apple_gpu(State& state) {
  if (!state.host.mps) return;
  const bool could_be = state.accelerator_object
                            ? state.accelerator_object->device == DeviceType::mps
                            : state.accelerator == "mps" || state.accelerator == "auto" || state.accelerator == "gpu";
  if (!could_be) return;
  bool parallel = false;
  if (state.strategy_object) {
    parallel = is_parallel(state.strategy_object->facts);
  } else {
    const std::string_view name = state.strategy;
    for (std::size_t i = 0; i + 1 < name.size(); ++i) parallel |= name[i] == 'd' && name[i + 1] == 'p';
    parallel |= name.substr(0, 9) == "deepspeed";
  }
  if (!parallel) return;
  state.refuse(Problem(Code::mps_parallel_strategy, "strategy",
                       state.strategy_object ? shown_strategy(state).view() : state.strategy));
}

constexpr void check_precision_value(State& state) {
  if (!state.precision_given) {
    if (state.precision_object) return;
    state.precision = F32::facts.flag;
    state.out.precision = F32::facts;
    state.out.precision_flag = F32::facts.flag;
    return;
  }
  const PrecisionFlag& flag = state.flags.precision;
  const bool number = state.out.sources.precision == Source::flag && flag.form == PrecisionFlag::Form::integer;
  // Of numbers only these three are legal, while each of the texts is.
  if (number) state.precision = flag.number == 16 ? "16" : flag.number == 32 ? "32" : flag.number == 64 ? "64" : "";
  for (const PrecisionEntry& entry : precision_entries) {
    if (entry.flag != state.precision) continue;
    state.out.precision = *entry.facts;
    state.precision = entry.facts->flag;
    state.out.precision_flag = entry.facts->flag;
    if (entry.discouraged) state.note(Note::precision_alias_discouraged);
    return;
  }
  Problem problem(Code::invalid_precision, "precision");
  if (number) {
    problem.name(flag.number);
  } else {
    problem.name(in_quotes(state.precision));
  }
  Nearest nearest(number ? problem.names.view() : state.precision);
  for (const PrecisionEntry& entry : precision_entries) {
    if (!entry.discouraged) nearest.consider(entry.flag);
  }
  problem.nearest = nearest.best;
  state.refuse(problem);
}

constexpr void check_plugins(State& state) {
  constexpr std::array<std::string_view, 3> kinds{"Precision", "CheckpointIO", "ClusterEnvironment"};
  std::array<int, 3> seen{};
  std::array<std::size_t, 3> order{};
  std::size_t different = 0;
  for (const Plugin& plugin : state.flags.plugins) {
    const auto kind = static_cast<std::size_t>(plugin.kind);
    if (seen[kind]++ == 0) order[different++] = kind;
    switch (plugin.kind) {
      case Plugin::Kind::precision:
        state.precision_object = Maybe(plugin.precision);
        state.out.sources.precision = Source::plugin;
        break;
      case Plugin::Kind::checkpoint:
        state.out.checkpoint = plugin.checkpoint;
        state.out.sources.checkpoint = Source::plugin;
        break;
      case Plugin::Kind::environment:
        state.environment_object = Maybe(plugin.environment);
        state.out.sources.environment = Source::plugin;
        break;
    }
  }
  Text<112> duplicates;
  for (std::size_t i = 0; i < different; ++i) {
    if (seen[order[i]] < 2) continue;
    if (!duplicates.empty()) duplicates.append(", ");
    duplicates.append(kinds[order[i]]);
  }
  if (!duplicates.empty()) state.refuse(Problem(Code::duplicate_plugins, "plugins", duplicates));
  if (seen[0] > 0 && state.precision_given) {
    state.refuse(Problem(Code::precision_flag_and_plugin, "precision", state.precision));
  }
}

/// The environment of the strategies that the XLA runtime launches.
inline constexpr EnvironmentObject xla_environment{EnvironmentFacts{.name = "Xla", .kind = EnvironmentKind::xla}};

/// What a strategy object brings must not be given a second time.
constexpr void check_strategy_object(State& state) {
  const Maybe<StrategyObject> object = state.strategy_object;
  if (!object) return;
  Selection& out = state.out;
  if (object->has_accelerator) {
    if (state.accelerator_object || state.accelerator != "auto") {
      state.refuse(Problem(Code::accelerator_flag_and_strategy, "accelerator"));
    }
    state.accelerator_object = Maybe(object->accelerator);
    out.sources.accelerator = Source::strategy;
  }
  if (object->has_precision) {
    if (state.precision_object) state.refuse(Problem(Code::precision_plugin_and_strategy, "plugins"));
    state.precision_object = Maybe(object->precision);
    out.sources.precision = Source::strategy;
  }
  if (object->checkpoint != CheckpointKind::none) {
    if (out.checkpoint != CheckpointKind::none) {
      state.refuse(Problem(Code::checkpoint_io_plugin_and_strategy, "plugins"));
    }
    out.checkpoint = object->checkpoint;
    out.sources.checkpoint = Source::strategy;
  }
  const bool launched_by_xla =
      object->facts.family == StrategyFamily::xla || object->facts.family == StrategyFamily::xla_fsdp;
  if (object->environment.given() || launched_by_xla) {
    if (state.environment_object) {
      state.refuse(Problem(Code::cluster_env_plugin_and_strategy, "plugins"));
    }
    state.environment_object = Maybe(launched_by_xla ? xla_environment : object->environment);
    out.sources.environment = Source::strategy;
  }
  if (object->devices.count == 0) return;
  const DeviceType type = object->devices.type;
  if (type != DeviceType::cpu && type != DeviceType::cuda) return;
  const bool cpu = type == DeviceType::cpu;
  const std::string_view flag = cpu ? "cpu" : "cuda";
  const Maybe<AcceleratorFacts> accelerator = state.accelerator_object;
  const bool same =
      accelerator ? accelerator->device == type
                  : state.accelerator == "auto" || state.accelerator == flag || (!cpu && state.accelerator == "gpu");
  if (!same) {
    Problem problem(cpu ? Code::cpu_devices_vs_accelerator : Code::cuda_devices_vs_accelerator, "strategy",
                    object->facts.name);
    problem.name(accelerator ? std::string_view("<") : state.accelerator);
    state.refuse(problem);
  } else if (!accelerator) {
    state.accelerator = flag;
    out.sources.accelerator = Source::strategy;
  }
}

/// Stage config_flags: names, values and what contradicts what, before the machine is looked at.
constexpr void check_flags(State& state) {
  check_strategy_name(state);
  check_accelerator_name(state);
  check_apple_gpu(state);
  check_precision_value(state);
  check_plugins(state);
  check_strategy_object(state);
}

/// Stage device_flags: how many nodes and devices, before the accelerator says what they mean.
constexpr void check_counts(State& state) {
  state.out.num_nodes = state.num_nodes;
  if (state.num_nodes < 1) {
    Problem problem(Code::invalid_num_nodes, "num_nodes");
    problem.name(static_cast<long long>(state.num_nodes)).detail.append("a whole number above 0");
    state.refuse(problem);
  }
  if (is_zero_like(*state.devices)) {
    Problem problem(Code::zero_devices, "devices", shown(*state.devices));
    problem.name(state.accelerator_object ? state.accelerator_object->name.view() : state.accelerator);
    state.refuse(problem);
  }
}

}  // namespace fabric::detail
