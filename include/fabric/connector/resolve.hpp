// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fabric/connector/flags.hpp"
#include "fabric/connector/host.hpp"
#include "fabric/connector/selection.hpp"
#include "fabric/connector/stages/accelerator.hpp"
#include "fabric/connector/stages/config.hpp"
#include "fabric/connector/stages/environment.hpp"
#include "fabric/connector/stages/launch.hpp"
#include "fabric/connector/stages/merge.hpp"
#include "fabric/connector/stages/objects.hpp"
#include "fabric/connector/stages/precision.hpp"
#include "fabric/connector/stages/strategy.hpp"
#include "fabric/policy/registry.hpp"

namespace fabric {

namespace detail {

/// The stages in the order in which their problems win. Problems of one group are independent of each other and are
/// reported together; a later group needs what an earlier one settles.
constexpr void run_stages(State& state) {
  const auto enter = [&](Stage stage) {
    state.stage = stage;
    return state.good();
  };
  check_objects(state);
  if (!enter(Stage::env_args)) return;
  merge_variables(state);
  if (!enter(Stage::config_flags)) return;
  check_flags(state);
  enter(Stage::device_flags);
  check_counts(state);
  if (!enter(Stage::choose_accelerator)) return;
  choose_accelerator(state);
  if (!enter(Stage::init_accelerator)) return;
  init_accelerator(state);
  if (!enter(Stage::cluster_env)) return;
  const AnyEnvironment environment = choose_environment(state);
  if (!enter(Stage::fallback)) return;
  settle_strategy(state);
  if (!enter(Stage::init_strategy)) return;
  init_strategy(state);
  if (!enter(Stage::precision)) return;
  init_precision(state);
  if (!enter(Stage::lazy_init)) return;
  give_to_strategy(state);
  if (state.good()) launch_strategy(state, environment);
  if (enter(Stage::rules)) check_rules(state);
}

}  // namespace detail

/// What these flags, with these environment variables, on this host come down to: a selection, or what is wrong with
/// them. A pure function: it reads nothing but its arguments, during compilation or at run time.
[[nodiscard]] constexpr Resolution resolve(const Flags& flags, const Variables& variables = {}, const Host& host = {},
                                           const Registry& registry = built_in_registry) {
  Resolution out;
  detail::State state{flags, variables, host, registry, out};
  detail::run_stages(state);
  return out;
}

}  // namespace fabric
