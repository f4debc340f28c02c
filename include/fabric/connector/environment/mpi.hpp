// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>

#include "fabric/connector/environment/variables.hpp"
#include "fabric/connector/lsf_hosts.hpp"

namespace fabric::detail {

/// The variables of one family of MPI launchers. Where there are several names for one number, the first that is set
/// counts.
struct MpiFamily {
  std::string_view launcher;
  std::string_view rank;
  std::array<std::string_view, 3> size;
  std::array<std::string_view, 3> local_rank;
  std::array<std::string_view, 3> local_size;
};

/// Open MPI (its launcher sets PMIX_RANK too), MPICH's Hydra and Intel MPI, MVAPICH, and PMIx alone, which tells a rank
/// and nothing else, so that the rest may come from the usual variables.
inline constexpr MpiFamily mpi_families[]{{"Open MPI",
                                           "OMPI_COMM_WORLD_RANK",
                                           {"OMPI_COMM_WORLD_SIZE"},
                                           {"OMPI_COMM_WORLD_LOCAL_RANK"},
                                           {"OMPI_COMM_WORLD_LOCAL_SIZE"}},
                                          {"MPICH or Intel MPI",
                                           "PMI_RANK",
                                           {"PMI_SIZE"},
                                           {"MPI_LOCALRANKID", "PMI_LOCAL_RANK", "I_MPI_LOCAL_RANK"},
                                           {"MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "I_MPI_LOCAL_SIZE"}},
                                          {"MVAPICH",
                                           "MV2_COMM_WORLD_RANK",
                                           {"MV2_COMM_WORLD_SIZE"},
                                           {"MV2_COMM_WORLD_LOCAL_RANK"},
                                           {"MV2_COMM_WORLD_LOCAL_SIZE"}},
                                          {"PMIx",
                                           "PMIX_RANK",
                                           {"PMIX_SIZE", "WORLD_SIZE"},
                                           {"PMIX_LOCAL_RANK", "LOCAL_RANK"},
                                           {"PMIX_LOCAL_SIZE", "LOCAL_WORLD_SIZE"}}};

/// mpirun or mpiexec: what an MPI library said, or else the launcher's variables.
struct MpiReader {
  /// The family whose rank or size is set.
  static constexpr Found<MpiFamily> family(const Variables& v) {
    for (const MpiFamily& f : mpi_families) {
      if (v.has(f.rank) || v.has(f.size[0])) return Found(f);
    }
    return {};
  }
  /// The first of `names` that is set, or else the first.
  static constexpr std::string_view known_as(const Variables& v, const std::array<std::string_view, 3>& names) {
    for (const std::string_view name : names) {
      if (!name.empty() && v.has(name)) return name;
    }
    return names[0];
  }

  static constexpr bool detected(const Variables& v, const Host& host) {
    if (host.mpi.available) return host.mpi.size > 1;
    const Found<MpiFamily> f = family(v);
    if (!f) return false;
    const Integer size = parse_integer(v.get(known_as(v, f->size)));
    return !size.valid || size.value > 1;  // half-set variables are a launcher's too: they are reported later
  }

  static constexpr Problem construct(const Variables& v, const Host& host) {
    if (host.mpi.available || family(v)) return {};
    Problem problem(Code::missing_mpi4py, "environment");
    problem.detail.append("no variable of an MPI launcher is set, such as OMPI_COMM_WORLD_RANK, PMI_RANK or PMIX_RANK");
    return problem;
  }

  /// MASTER_ADDR; the host of rank 0 where the job's hosts are known; this machine when all ranks are on it.
  static constexpr Expected<HostName> main_address(const Variables& v, const Host& host) {
    if (const Found<Variable> user = v.find("MASTER_ADDR")) return HostName(user->value);
    if (host.mpi.available) return HostName(host.mpi.host_count > 0 ? host.mpi.hosts[0] : host.hostname);
    for (const std::string_view name : {"SLURM_NODELIST", "SLURM_JOB_NODELIST"}) {
      const Expected<HostList> hosts = HostList::parse(v.get(name));
      if (hosts && !hosts->empty()) return hosts->front();
    }
    if (v.has("LSB_MCPU_HOSTS")) {
      const std::string_view first = LsfHosts::from_mcpu_hosts(v.get("LSB_MCPU_HOSTS")).main_host();
      if (!first.empty()) return HostName(first);
    }
    if (const Found<MpiFamily> f = family(v)) {
      const Integer size = parse_integer(v.get(known_as(v, f->size)));
      const Integer local = parse_integer(v.get(known_as(v, f->local_size)));
      if (!size.valid || !local.valid || size.value == local.value) return HostName("127.0.0.1");
    }
    Problem problem(Code::env_var_missing, "MASTER_ADDR", "MASTER_ADDR");
    problem.detail.append("ranks run on several hosts, and nothing says where rank 0 is: pass on MASTER_ADDR");
    return problem;
  }
  /// MASTER_PORT, or the port that rank 0 chose and told the others, or a fixed one.
  static constexpr Expected<int> main_port(const Variables& v, const Host& host) {
    return read_int_or(v, "MASTER_PORT", host.mpi.available ? host.mpi.main_port : 12910);
  }
  static constexpr Expected<int> world_size(const Variables& v, const Host& host) {
    if (host.mpi.available) return host.mpi.size;
    return read(v, Number::size);
  }
  static constexpr Expected<int> global_rank(const Variables& v, const Host& host) {
    if (host.mpi.available) return host.mpi.rank;
    return read(v, Number::rank);
  }
  static constexpr Expected<int> local_rank(const Variables& v, const Host& host) {
    if (!host.mpi.available) return read(v, Number::local_rank);
    if (const Expected<int> node = node_rank(v, host); !node) return node.problem;
    return host.mpi.local_rank;
  }
  /// The host's place among the job's hosts in alphabetical order; from variables, the place that a mapping by slot or
  /// by node gives it.
  static constexpr Expected<int> node_rank(const Variables& v, const Host& host) {
    if (!host.mpi.available) return node_rank_of_variables(v, host);
    const MpiFacts& mpi = host.mpi;
    bool known = false;
    int rank = 0;
    for (std::size_t i = 0; i < mpi.host_count; ++i) {
      known |= mpi.hosts[i] == host.hostname;
      bool repeated = false;
      for (std::size_t j = 0; j < i && !repeated; ++j) repeated = mpi.hosts[j] == mpi.hosts[i];
      if (!repeated && mpi.hosts[i] < host.hostname) ++rank;
    }
    if (known) return rank;
    Problem problem(Code::mpi_host_unknown, "hostname");
    problem.detail.append("no rank of the job runs on this host, ").append(host.hostname.substr(0, 70));
    return problem;
  }

  static constexpr Problem validate(const Variables&, const Host&, int, int) { return {}; }
  static constexpr Problem contradiction(const Variables& v, const Host& host) {
    const Found<MpiFamily> f = family(v);
    if (host.mpi.available || !f) return {};
    if (!below(v, f->rank, known_as(v, f->size))) {
      return detail::contradiction(v, {f->rank, known_as(v, f->size)}, "a rank is below the world size");
    }
    if (!below(v, known_as(v, f->local_rank), known_as(v, f->local_size))) {
      return detail::contradiction(v, {known_as(v, f->local_rank), known_as(v, f->local_size)},
                                   "a local rank is below the local size");
    }
    return {};
  }

 private:
  enum class Number { rank, size, local_rank };
  static constexpr Expected<int> read(const Variables& v, Number which) {
    const Found<MpiFamily> f = family(v);
    if (!f) return Problem(Code::env_var_missing, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_RANK");
    const std::string_view size = known_as(v, f->size);
    const std::string_view local_rank = known_as(v, f->local_rank);
    const Required<3> required{size, f->rank, local_rank};
    return read_int(v, which == Number::size ? size : which == Number::rank ? f->rank : local_rank, required);
  }

  static constexpr Expected<int> node_rank_of_variables(const Variables& v, const Host& host) {
    const Expected<int> rank = global_rank(v, host);
    const Expected<int> size = world_size(v, host);
    const Expected<int> local = local_rank(v, host);
    if (!rank) return rank.problem;
    if (!size) return size.problem;
    if (!local) return local.problem;
    const Found<MpiFamily> f = family(v);
    const Integer per_node = parse_integer(v.get(known_as(v, f->local_size)));
    if (!per_node.valid || per_node.value <= 0) return 0;
    const int n = to_int(per_node.value);
    if (*rank % n == *local) return *rank / n;
    const int nodes = *size / n + (*size % n != 0 ? 1 : 0);
    if (nodes > 0 && *rank / nodes == *local) return *rank % nodes;
    return *rank / n;
  }
};

}  // namespace fabric::detail
