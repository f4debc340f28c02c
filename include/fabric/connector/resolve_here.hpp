// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "fabric/connector/message.hpp"
#include "fabric/connector/probe.hpp"
#include "fabric/connector/resolve.hpp"
#include "fabric/error.hpp"
#include "fabric/policy/rules.hpp"

namespace fabric {

/// What these flags and this process's `LT_*` variables come down to on this machine. Throws fabric::Error that names
/// every problem. `registry` holds a program's own strategies too: `registry_with<Gossip>`.
[[nodiscard]] inline Selection resolve_here(const Flags& flags, const Registry& registry = built_in_registry) {
  const CapturedVariables variables = capture_variables();
  const Resolution resolution = resolve(flags, variables, probe_host(variables), registry);
  if (!resolution.ok()) throw Error(message(resolution.problems, registry));
  return resolution;
}

/// Is it this combination that the connector selected?
[[nodiscard]] constexpr bool selects(const Selection& selection, const Combination& combination) {
  return selection.accelerator == combination.accelerator && selection.strategy == combination.strategy &&
         selection.precision == combination.precision;
}

/// "Fabric<Cpu, Ddp, F32>".
[[nodiscard]] inline std::string name_of(const Combination& c) {
  std::string name = "Fabric<";
  return name.append(c.accelerator.name.view())
      .append(", ")
      .append(c.strategy.name.view())
      .append(", ")
      .append(c.precision.name.view())
      .append(">");
}

}  // namespace fabric
