// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fabric/connector/stages/state.hpp"

namespace fabric::detail {

/// An environment of the library or of the program, asked in the same way.
struct AnyEnvironment {
  Environment known{};
  Maybe<EnvironmentObject> custom{};

  [[nodiscard]] constexpr bool external() const {
    return custom ? custom->external : known.creates_processes_externally();
  }
  [[nodiscard]] constexpr Expected<int> world_size() const {
    return custom ? Expected<int>(custom->world_size) : known.world_size();
  }
  [[nodiscard]] constexpr Expected<int> global_rank() const {
    return custom ? Expected<int>(custom->global_rank) : known.global_rank();
  }
  [[nodiscard]] constexpr Expected<int> local_rank() const {
    return custom ? Expected<int>(custom->local_rank) : known.local_rank();
  }
  [[nodiscard]] constexpr Expected<int> node_rank() const {
    return custom ? Expected<int>(custom->node_rank) : known.node_rank();
  }
};

constexpr EnvironmentFacts environment_facts(EnvironmentKind kind) {
  switch (kind) {
    case EnvironmentKind::torchelastic: return TorchElastic::facts;
    case EnvironmentKind::slurm: return Slurm::facts;
    case EnvironmentKind::lsf: return Lsf::facts;
    case EnvironmentKind::mpi: return Mpi::facts;
    case EnvironmentKind::kubeflow: return Kubeflow::facts;
    case EnvironmentKind::xla: return {.name = "Xla", .kind = EnvironmentKind::xla};
    default: return Local::facts;
  }
}

/// Stage cluster_env: the given environment, else the one that is detected.
constexpr AnyEnvironment choose_environment(State& state) {
  Selection& out = state.out;
  EnvironmentChoice choice;
  if (state.environment_object) {
    out.environment = state.environment_object->facts;
    if (out.environment.kind == EnvironmentKind::custom) return {.custom = state.environment_object};
    choice.forced = out.environment.kind;
  } else {
    std::string_view text = state.flags.environment;
    if (!text.empty() && text != "auto") out.sources.environment = Source::flag;
    if (const auto v = state.variables.find("LT_ENVIRONMENT")) {
      text = v->value;
      out.sources.environment = Source::variable;
    }
    const auto parsed = parse_environment_choice(text);
    if (!parsed) {
      state.refuse(parsed.problem);
      return {};
    }
    choice = *parsed;
    // Slurm is only asked where torchrun is not there.
    if (choice.forced == EnvironmentKind::detected && srun_not_used(state.variables, state.host) &&
        !detects(EnvironmentKind::torchelastic, state.variables, state.host)) {
      state.note(Note::srun_not_used);
    }
  }
  const EnvironmentKind kind = detect_environment(state.variables, state.host, choice);
  const auto made = construct_environment(kind, state.variables, state.host);
  if (!made) {
    state.refuse(made.problem);
    return {};
  }
  if (const Problem problem = made->contradiction(); problem.code != Code::none) {
    state.refuse(problem);
    return {};
  }
  out.environment = environment_facts(kind);
  return {.known = *made};
}

}  // namespace fabric::detail
