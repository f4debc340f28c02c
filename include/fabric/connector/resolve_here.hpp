// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdio>
#include <string>

#include "fabric/connector/environment.hpp"
#include "fabric/connector/message.hpp"
#include "fabric/connector/probe.hpp"
#include "fabric/connector/resolve.hpp"
#include "fabric/error.hpp"
#include "fabric/policy/rules.hpp"

namespace fabric {

namespace detail {

/// Takes nothing away from a host.
struct WholeHost {
  void operator()(Host& /*host*/) const {}
};

}  // namespace detail

/// What these flags and this process's `LT_*` variables come down to on this machine. Rank 0 prints what a fallback
/// replaced and what else is worth a warning. Throws fabric::Error that names every problem. `registry` holds a
/// program's own strategies too: `registry_with<Gossip>`. `narrow(host)` may take away what the program has no use for.
template <class Narrow = detail::WholeHost>
[[nodiscard]] Selection resolve_here(const Flags& flags, const Registry& registry = built_in_registry,
                                     Narrow&& narrow = {}) {
  const CapturedVariables captured = capture_variables();
  const Variables variables = captured;
  const ProbedHost probed = probe_host(variables);
  Host host = probed;
  narrow(host);
  const Resolution resolution = resolve(flags, variables, host, registry);
  if (!resolution.ok()) throw Error(message(resolution.problems, registry));
  static unsigned printed = 0;  // a bit for each note: once is enough
  for (const Note note : resolution.notes) {
    const unsigned bit = 1U << static_cast<unsigned>(note);
    if (is_warning(note) && (printed & bit) == 0 && rank_for_messages(variables) == 0) {
      printed |= bit;
      std::fprintf(stderr, "fabric: warning: %s\n", detail::note_sentence(note).c_str());
    }
  }
  return resolution;
}

/// Is it this combination that the connector selected? `Detected` stands for every environment.
[[nodiscard]] constexpr bool selects(const Selection& selection, const Combination& combination) {
  return selection.accelerator == combination.accelerator && selection.strategy == combination.strategy &&
         selection.precision == combination.precision &&
         (combination.environment.kind == EnvironmentKind::detected ||
          selection.environment == combination.environment);
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
