// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

#include "fabric/connector/environment/lsf.hpp"
#include "fabric/connector/environment/mpi.hpp"
#include "fabric/connector/environment/simple.hpp"
#include "fabric/connector/environment/slurm.hpp"
#include "fabric/connector/environment/torchelastic.hpp"
#include "fabric/connector/host.hpp"
#include "fabric/connector/nearest.hpp"
#include "fabric/connector/problem.hpp"
#include "fabric/policy/environment.hpp"

namespace fabric {

/// What reading an environment warns of, as bits.
enum class EnvironmentWarning : std::uint8_t { master_addr_default = 1, master_port_default = 2, srun_not_used = 4 };

/// Which environments may be detected: one that is forced, or some that are turned off.
struct EnvironmentChoice {
  EnvironmentKind forced = EnvironmentKind::detected;
  std::uint16_t off = 0;  ///< A bit for each kind.

  [[nodiscard]] constexpr bool is_off(EnvironmentKind kind) const {
    return (off >> static_cast<unsigned>(kind) & 1U) != 0;
  }
  friend constexpr bool operator==(const EnvironmentChoice&, const EnvironmentChoice&) = default;
};

namespace detail {

struct EnvironmentName {
  std::string_view flag;
  EnvironmentKind kind;
};
inline constexpr EnvironmentName environment_names[]{{"torchelastic", EnvironmentKind::torchelastic},
                                                     {"slurm", EnvironmentKind::slurm},
                                                     {"lsf", EnvironmentKind::lsf},
                                                     {"mpi", EnvironmentKind::mpi},
                                                     {"local", EnvironmentKind::local},
                                                     {"kubeflow", EnvironmentKind::kubeflow},
                                                     {"xla", EnvironmentKind::xla},
                                                     {"torchrun", EnvironmentKind::torchelastic},
                                                     {"lightning", EnvironmentKind::local}};

/// The order of detection. `local` is always there.
inline constexpr EnvironmentKind detection_order[]{EnvironmentKind::torchelastic, EnvironmentKind::slurm,
                                                   EnvironmentKind::lsf, EnvironmentKind::mpi};

/// What each kind of environment answers, from `fabric/connector/environment/`.
struct EnvironmentReader {
  bool (*detected)(const Variables&, const Host&);
  Problem (*construct)(const Variables&, const Host&);
  Expected<HostName> (*main_address)(const Variables&, const Host&);
  Expected<int> (*main_port)(const Variables&, const Host&);
  Expected<int> (*world_size)(const Variables&, const Host&);
  Expected<int> (*global_rank)(const Variables&, const Host&);
  Expected<int> (*local_rank)(const Variables&, const Host&);
  Expected<int> (*node_rank)(const Variables&, const Host&);
  Problem (*validate)(const Variables&, const Host&, int devices, int num_nodes);
  Problem (*contradiction)(const Variables&, const Host&);
};

template <class R>
inline constexpr EnvironmentReader reader{R::detected,   R::construct,    R::main_address, R::main_port,
                                          R::world_size, R::global_rank,  R::local_rank,   R::node_rank,
                                          R::validate,   R::contradiction};

constexpr const EnvironmentReader& reader_of(EnvironmentKind kind) {
  switch (kind) {
    case EnvironmentKind::torchelastic: return reader<TorchElasticReader>;
    case EnvironmentKind::slurm: return reader<SlurmReader>;
    case EnvironmentKind::lsf: return reader<LsfReader>;
    case EnvironmentKind::mpi: return reader<MpiReader>;
    case EnvironmentKind::kubeflow: return reader<KubeflowReader>;
    case EnvironmentKind::xla: return reader<XlaReader>;
    default: return reader<LocalReader>;
  }
}

}  // namespace detail

/// The flag's name of an environment: "slurm".
[[nodiscard]] constexpr std::string_view flag_name(EnvironmentKind kind) {
  for (const detail::EnvironmentName& name : detail::environment_names) {
    if (name.kind == kind) return name.flag;
  }
  return kind == EnvironmentKind::detected ? "auto" : "custom";
}

/// Reads the value of `--environment` or LT_ENVIRONMENT: "auto" or nothing; a name, which forces that environment; or
/// names with a minus, which turn those off: "-slurm,-mpi".
[[nodiscard]] constexpr Expected<EnvironmentChoice> parse_environment_choice(std::string_view text,
                                                                             std::string_view flag = "environment") {
  EnvironmentChoice choice;
  const std::string_view given = text;
  const auto refuse = [&](std::string_view why) {
    Problem problem = detail::bad_value(Code::unknown_environment, flag, given);
    problem.detail.append(why);
    return problem;
  };
  while (true) {
    const std::size_t comma = detail::find(text, ',');
    std::string_view name = trimmed(text.substr(0, comma));
    if (!name.empty() && name != "auto") {
      const bool off = name[0] == '-';
      if (off) name = trimmed(name.substr(1));
      Found<EnvironmentKind> found;
      for (const detail::EnvironmentName& known : detail::environment_names) {
        if (detail::same_ignoring_case(known.flag, name)) found = Found(known.kind);
      }
      if (!found) {
        Problem problem =
            refuse("legal: auto, torchelastic, slurm, lsf, mpi, kubeflow, local, xla; '-slurm' turns one off");
        detail::Nearest nearest(name);
        for (const detail::EnvironmentName& known : detail::environment_names) nearest.consider(known.flag);
        problem.nearest.append(off && !nearest.best.empty() ? "-" : "").append(nearest.best);
        return problem;
      }
      if (off) {
        if (*found == EnvironmentKind::local)
          return refuse("local is what is left when nothing else is: it cannot be off");
        choice.off = static_cast<std::uint16_t>(choice.off | 1U << static_cast<unsigned>(*found));
      } else {
        if (choice.forced != EnvironmentKind::detected && choice.forced != *found)
          return refuse("only one can be forced");
        choice.forced = *found;
      }
    }
    if (comma == std::string_view::npos) break;
    text.remove_prefix(comma + 1);
  }
  if (choice.is_off(choice.forced)) return refuse("forced and turned off at once");
  return choice;
}

/// Whether the variables say that this process was started by that launcher. False for Kubeflow, which cannot be told.
[[nodiscard]] constexpr bool detects(EnvironmentKind kind, const Variables& variables, const Host& host) {
  return detail::reader_of(kind).detected(variables, host);
}

/// The environment that is there: the forced one, or the first of torchelastic, slurm, lsf, mpi that is detected and
/// not turned off, else local. A stray RANK, NODE_RANK or WORLD_SIZE is no launcher.
[[nodiscard]] constexpr EnvironmentKind detect_environment(const Variables& variables, const Host& host,
                                                           const EnvironmentChoice& choice = {}) {
  if (choice.forced != EnvironmentKind::detected) return choice.forced;
  for (const EnvironmentKind kind : detail::detection_order) {
    if (!choice.is_off(kind) && detects(kind, variables, host)) return kind;
  }
  return EnvironmentKind::local;
}

/// Slurm is installed, but this process was not started with srun: worth a warning when Slurm is asked about.
[[nodiscard]] constexpr bool srun_not_used(const Variables& variables, const Host& host) {
  return detail::SlurmReader::srun_not_used(variables, host);
}

/// The rank by which a process decides whether it prints warnings, before any environment is chosen.
[[nodiscard]] constexpr int rank_for_messages(const Variables& variables) {
  for (const std::string_view name :
       {"RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"}) {
    if (const Found<Variable> v = variables.find(name)) return to_int(parse_integer(v->value).value);
  }
  return 0;
}

/// What an environment says of this process and its job. Each number is read when it is asked for, and a variable that
/// is missing or no integer is a problem that names all that are. It views the variables and the host, which must
/// outlive it.
class Environment {
 public:
  constexpr Environment() = default;
  constexpr Environment(EnvironmentKind kind, const Variables& variables, const Host& host)
      : kind_(kind), variables_(variables), host_(&host) {}

  [[nodiscard]] constexpr EnvironmentKind kind() const { return kind_; }

  /// Whether all processes were started by somebody else.
  [[nodiscard]] constexpr bool creates_processes_externally() const {
    if (kind_ == EnvironmentKind::local) return variables_.has("LOCAL_RANK");
    return kind_ != EnvironmentKind::xla;
  }
  /// Whether MASTER_ADDR and MASTER_PORT are set for this process when it launches.
  [[nodiscard]] constexpr bool publishes_address() const {
    return kind_ == EnvironmentKind::torchelastic || kind_ == EnvironmentKind::slurm || kind_ == EnvironmentKind::lsf;
  }

  /// The host of global rank 0. A user's MASTER_ADDR wins.
  [[nodiscard]] constexpr Expected<HostName> main_address() const {
    return detail::reader_of(kind_).main_address(variables_, *host_);
  }
  /// The port there; 0 = choose a free one. A user's MASTER_PORT wins.
  [[nodiscard]] constexpr Expected<int> main_port() const {
    return detail::reader_of(kind_).main_port(variables_, *host_);
  }
  [[nodiscard]] constexpr Expected<int> world_size() const {
    if (kind_ == EnvironmentKind::local) return world_size_;
    return detail::reader_of(kind_).world_size(variables_, *host_);
  }
  [[nodiscard]] constexpr Expected<int> global_rank() const {
    if (kind_ == EnvironmentKind::local) return global_rank_;
    return detail::reader_of(kind_).global_rank(variables_, *host_);
  }
  [[nodiscard]] constexpr Expected<int> local_rank() const {
    return detail::reader_of(kind_).local_rank(variables_, *host_);
  }
  [[nodiscard]] constexpr Expected<int> node_rank() const {
    return detail::reader_of(kind_).node_rank(variables_, *host_);
  }

  /// The strategy's world size and rank. Only a local environment takes them: launchers know their own.
  constexpr void set_world_size(int size) { world_size_ = size; }
  constexpr void set_global_rank(int rank) { global_rank_ = rank; }

  /// Slurm's job name and number (-1 = none); nothing elsewhere.
  [[nodiscard]] constexpr Found<Variable> job_name() const {
    return kind_ == EnvironmentKind::slurm ? variables_.find("SLURM_JOB_NAME") : Found<Variable>{};
  }
  [[nodiscard]] constexpr std::int64_t job_id() const {
    return kind_ == EnvironmentKind::slurm ? detail::SlurmReader::job_id(variables_) : -1;
  }

  /// Compares the flags with what the launcher started.
  [[nodiscard]] constexpr Problem validate_settings(int devices, int num_nodes) const {
    return detail::reader_of(kind_).validate(variables_, *host_, devices, num_nodes);
  }
  /// Variables that cannot all be true, such as a rank beyond the world size; one problem names them.
  [[nodiscard]] constexpr Problem contradiction() const {
    return detail::reader_of(kind_).contradiction(variables_, *host_);
  }

  /// What was filled in or looks odd, as bits of EnvironmentWarning. Only rank 0 has any to print.
  [[nodiscard]] constexpr unsigned warnings() const {
    if (rank_for_messages(variables_) != 0) return 0;
    unsigned bits = 0;
    if (kind_ == EnvironmentKind::torchelastic) {
      if (!variables_.has("MASTER_ADDR")) bits |= static_cast<unsigned>(EnvironmentWarning::master_addr_default);
      if (!variables_.has("MASTER_PORT")) bits |= static_cast<unsigned>(EnvironmentWarning::master_port_default);
    }
    if (kind_ == EnvironmentKind::slurm && srun_not_used(variables_, *host_)) {
      bits |= static_cast<unsigned>(EnvironmentWarning::srun_not_used);
    }
    return bits;
  }

 private:
  EnvironmentKind kind_ = EnvironmentKind::local;
  Variables variables_;
  const Host* host_ = nullptr;
  int world_size_ = 1;
  int global_rank_ = 0;
};

/// Makes the environment of that kind, or says why it cannot be: variables that its launcher always sets are missing,
/// a rank file cannot be read.
[[nodiscard]] constexpr Expected<Environment> construct_environment(EnvironmentKind kind, const Variables& variables,
                                                                    const Host& host) {
  Problem problem = detail::reader_of(kind).construct(variables, host);
  if (problem.code != Code::none) return problem;
  return Environment(kind, variables, host);
}

}  // namespace fabric
