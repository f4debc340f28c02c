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
  check_objects(state);
  if (!state.good()) return;
  merge_variables(state);
  if (!state.good()) return;
  check_flags(state);
  check_counts(state);
  if (!state.good()) return;
  choose_accelerator(state);
  if (!state.good()) return;
  init_accelerator(state);
  if (!state.good()) return;
  const AnyEnvironment environment = choose_environment(state);
  if (!state.good()) return;
  settle_strategy(state);
  if (!state.good()) return;
  init_strategy(state);
  if (!state.good()) return;
  init_precision(state);
  if (!state.good()) return;
  give_to_strategy(state);
  if (!state.good()) return;
  launch_strategy(state, environment);
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
