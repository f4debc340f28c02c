// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include "fabric/policy/text.hpp"

namespace fabric {

/// Who started this process and knows its rank.
enum class EnvironmentKind : std::uint8_t { detected, torchelastic, slurm, lsf, mpi, kubeflow, local, xla, custom };

/// What is known of a cluster environment without asking it.
struct EnvironmentFacts {
  Name name;  ///< The policy's own name, for messages: "Slurm".
  EnvironmentKind kind = EnvironmentKind::custom;

  friend constexpr bool operator==(const EnvironmentFacts&, const EnvironmentFacts&) = default;
};

/// An environment policy is an empty type with `static constexpr EnvironmentFacts facts`.
template <class E>
concept EnvironmentPolicy = std::is_empty_v<E> && requires {
  { E::facts } -> std::convertible_to<EnvironmentFacts>;
};

/// Chosen at run time from the variables: torchelastic, slurm, lsf, mpi, else local. The default.
struct Detected {
  static constexpr EnvironmentFacts facts{.name = "Detected", .kind = EnvironmentKind::detected};
};

/// Started by torchrun.
struct TorchElastic {
  static constexpr EnvironmentFacts facts{.name = "TorchElastic", .kind = EnvironmentKind::torchelastic};
};

/// Started by Slurm's srun.
struct Slurm {
  static constexpr EnvironmentFacts facts{.name = "Slurm", .kind = EnvironmentKind::slurm};
};

/// Started by LSF's jsrun.
struct Lsf {
  static constexpr EnvironmentFacts facts{.name = "Lsf", .kind = EnvironmentKind::lsf};
};

/// Started by mpirun or mpiexec.
struct Mpi {
  static constexpr EnvironmentFacts facts{.name = "Mpi", .kind = EnvironmentKind::mpi};
};

/// Started by Kubeflow's PyTorchJob.
struct Kubeflow {
  static constexpr EnvironmentFacts facts{.name = "Kubeflow", .kind = EnvironmentKind::kubeflow};
};

/// Started by hand: this program starts the other local ranks itself.
struct Local {
  static constexpr EnvironmentFacts facts{.name = "Local", .kind = EnvironmentKind::local};
};

static_assert(EnvironmentPolicy<Detected> && EnvironmentPolicy<Kubeflow>);

}  // namespace fabric
