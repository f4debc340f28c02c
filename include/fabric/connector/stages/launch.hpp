// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fabric/connector/stages/environment.hpp"
#include "fabric/connector/stages/objects.hpp"
#include "fabric/connector/stages/state.hpp"

namespace fabric::detail {

/// A number read from the environment as a selection keeps it: with the reason where it is not known.
constexpr Rank as_rank(const Expected<int>& read) {
  if (read) return {.value = *read};
  return {.code = read.problem.code, .name = read.problem.names.view()};
}

constexpr void choose_launcher(State& state) {
  Selection& out = state.out;
  switch (out.strategy.start_method) {
    case StartMethod::none: return;
    case StartMethod::popen:
      // Ddp and DeepSpeed keep their launcher where somebody else started the processes; it finds nothing to do.
      if (out.external_launch &&
          (out.strategy.family == StrategyFamily::fsdp || out.strategy.family == StrategyFamily::model_parallel)) {
        return;
      }
      out.launcher = Launcher::subprocess;
      break;
    default: out.launcher = is_xla(out.strategy) ? Launcher::xla : Launcher::multiprocessing; break;
  }
  out.start_method = out.strategy.start_method;
  const bool forks = out.start_method == StartMethod::fork || out.start_method == StartMethod::forkserver;
  if (out.launcher == Launcher::multiprocessing && forks && !state.host.fork) {
    state.refuse(Problem(Code::start_method_unavailable, "strategy",
                         out.start_method == StartMethod::fork ? "fork" : "forkserver"));
  }
}

/// Stage lazy_init, first half: what the strategy takes.
constexpr void give_to_strategy(State& state) {
  Selection& out = state.out;
  if (const Code code = precision_type_problem(out.strategy, out.precision_engine); code != Code::none) {
    return state.refuse(Problem(code, "plugins"));
  }
  if (out.checkpoint == CheckpointKind::none) return;
  const StrategyFamily family = out.strategy.family;
  if (family == StrategyFamily::fsdp || family == StrategyFamily::model_parallel) {
    state.refuse(Problem(Code::checkpoint_io_not_supported, "plugins", out.strategy.name));
  } else if (is_xla(out.strategy) && out.checkpoint != CheckpointKind::xla) {
    state.refuse(Problem(Code::xla_checkpoint_io_type, "plugins"));
  }
}

/// The ranks as the strategy sees them. The first one that it needs and cannot read is a problem.
constexpr void read_ranks(State& state, AnyEnvironment& environment) {
  Selection& out = state.out;
  const int processes = out.devices.count;
  const bool distributes = out.strategy.family != StrategyFamily::data_parallel && !is_xla(out.strategy);
  const Expected<int> node = environment.node_rank();
  const Expected<int> local = environment.local_rank();
  // Flags and variables may carry any number: a product beyond an int is cut, not undefined.
  const int replicas = to_int(static_cast<std::int64_t>(out.num_nodes) * processes);
  if (distributes) {
    if (!node) return state.refuse(node.problem);
    if (!local) return state.refuse(local.problem);
    environment.known.set_global_rank(to_int(static_cast<std::int64_t>(*node) * processes + *local));
    environment.known.set_world_size(replicas);
  }
  const Expected<int> global = environment.global_rank();
  if (distributes && !global) return state.refuse(global.problem);
  out.world_size = as_rank(environment.world_size());
  out.global_rank = as_rank(global);
  out.local_rank = as_rank(local);
  out.node_rank = as_rank(node);
  out.sampler_replicas = {.value = replicas};
  if (out.strategy.family == StrategyFamily::deepspeed) out.sampler_replicas = out.world_size;
  if (distributes && !environment.custom) {
    const auto address = environment.known.main_address();
    // Without it the ranks would wait for each other for ever. Kubeflow's is not looked at before launch.
    const bool needed = out.environment.kind == EnvironmentKind::slurm || out.environment.kind == EnvironmentKind::mpi;
    if (!address && needed) return state.refuse(address.problem);
    out.main_address = address.value;
    out.main_port = address ? as_rank(environment.known.main_port()) : Rank{.code = address.problem.code};
  }
  if (distributes && !environment.custom) out.settings = environment.known.validate_settings(processes, out.num_nodes);
}

/// The rules that only the types had to fear until here, and their codes.
struct LateRule {
  RuleId rule;
  Code code;
};
inline constexpr LateRule late_rules[]{
    {RuleId::xla_strategy_needs_xla_accelerator, Code::xla_strategy_needs_xla},
    {RuleId::mps_drives_one_device, Code::mps_parallel_strategy},
    {RuleId::data_parallel_needs_gpus, Code::data_parallel_needs_gpus},
    {RuleId::mps_has_no_64_bit_floats, Code::mps_has_no_64_bit_floats},
    {RuleId::mps_has_no_fp8, Code::mps_has_no_fp8},
};

/// Stage lazy_init, second half: ranks and launcher.
constexpr void launch_strategy(State& state, AnyEnvironment environment) {
  Selection& out = state.out;
  if (is_xla(out.strategy) && out.strategy.family != StrategyFamily::single_device_xla) {
    environment = {.known = Environment(EnvironmentKind::xla, state.variables, state.host)};
    out.environment = environment_facts(EnvironmentKind::xla);
  }
  out.external_launch = environment.external();
  if (is_parallel(out.strategy)) read_ranks(state, environment);
  if (!state.good()) return;
  choose_launcher(state);
  if (!state.good()) return;
  const bool works_interactively =
      out.launcher == Launcher::none || out.launcher == Launcher::xla || out.start_method == StartMethod::fork;
  if (state.host.interactive && !works_interactively) {
    return state.refuse(Problem(Code::interactive_incompatible, "strategy", shown_strategy(state)));
  }
  if (state.refused_by(RuleId::xla_accelerator_needs_xla_strategy)) {
    state.refuse(Problem(Code::xla_needs_xla_strategy, "strategy", out.strategy.name));
  }
}

/// Stage rules: what the types would refuse.
constexpr void check_rules(State& state) {
  const Selection& out = state.out;
  const Combination chosen = state.combination();
  for (const LateRule& late : late_rules) {
    if (rule_of(late.rule).refuses(chosen)) {
      Problem problem(late.code, "strategy", shown_strategy(state));
      problem.name(out.accelerator.name).name(out.precision.name);
      return state.refuse(problem);
    }
  }
}

}  // namespace fabric::detail
