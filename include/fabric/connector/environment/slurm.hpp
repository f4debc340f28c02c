// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>

#include "fabric/connector/environment/variables.hpp"

namespace fabric::detail {

/// Slurm's srun: one task is one process.
struct SlurmReader {
  static constexpr Required<4> required{"SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"};

  /// A shell inside an allocation is not a task of the job.
  static constexpr bool interactive(const Variables& v) {
    const std::string_view name = v.get("SLURM_JOB_NAME");
    return name == "bash" || name == "interactive";
  }
  static constexpr bool detected(const Variables& v, const Host&) { return v.has("SLURM_NTASKS") && !interactive(v); }
  /// Slurm is installed, but this process was not started with srun.
  static constexpr bool srun_not_used(const Variables& v, const Host& host) { return host.srun && !detected(v, host); }

  static constexpr Problem construct(const Variables& v, const Host&) {
    const Found<Variable> tasks = v.find("SLURM_NTASKS");
    if (!tasks) return {};
    const Integer count = parse_integer(tasks->value);
    if (!count.valid) {
      Problem problem(Code::slurm_var_not_int, "SLURM_NTASKS");
      problem.detail.append("SLURM_NTASKS is '").append(tasks->value.substr(0, 80)).append("'");
      return problem;
    }
    if (count.value <= 1 || v.has("SLURM_NTASKS_PER_NODE")) return {};
    Problem problem(Code::slurm_ntasks_unsupported, "SLURM_NTASKS");
    problem.name(static_cast<long long>(count.value));
    return problem;
  }

  /// The first host of the step, or else of the job.
  static constexpr Expected<HostName> main_address(const Variables& v, const Host&) {
    if (const Found<Variable> user = v.find("MASTER_ADDR")) return HostName(user->value);
    for (const std::string_view name : {"SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"}) {
      const Found<Variable> list = v.find(name);
      if (!list) continue;
      Expected<HostList> hosts = HostList::parse(list->value, HostListGrammar::lenient);
      if (hosts && !hosts->empty()) return hosts->front();
      Problem problem = hosts.problem;
      if (hosts) {
        problem = bad_value(Code::hostlist_invalid, name, list->value);
        problem.detail.append("it names no host");
      }
      problem.flag = name;
      return problem;
    }
    return HostName("127.0.0.1");
  }
  /// MASTER_PORT, or 15000 plus the last four digits of the job's number, so that all tasks agree.
  static constexpr Expected<int> main_port(const Variables& v, const Host&) {
    if (v.has("MASTER_PORT")) return read_int_or(v, "MASTER_PORT", 0);
    const Found<Variable> job = v.find("SLURM_JOB_ID");
    if (!job) return 12910;
    const std::string_view id = job->value;
    const std::string_view last = id.size() > 4 ? id.substr(id.size() - 4) : id;
    const Integer number = parse_integer(last);
    if (!number.valid) return bad_value(Code::env_var_not_int, "SLURM_JOB_ID", last);
    return to_int(number.value) + 15000;
  }
  static constexpr Expected<int> world_size(const Variables& v, const Host&) {
    return read_int(v, "SLURM_NTASKS", required);
  }
  static constexpr Expected<int> global_rank(const Variables& v, const Host&) {
    return read_int(v, "SLURM_PROCID", required);
  }
  static constexpr Expected<int> local_rank(const Variables& v, const Host&) {
    return read_int(v, "SLURM_LOCALID", required);
  }
  static constexpr Expected<int> node_rank(const Variables& v, const Host&) {
    return read_int(v, "SLURM_NODEID", required);
  }
  /// The job's number, or -1 outside a job and in an interactive shell.
  static constexpr std::int64_t job_id(const Variables& v) {
    const Integer id = parse_integer(v.get("SLURM_JOB_ID"));
    return id.valid && !interactive(v) ? id.value : -1;
  }

  static constexpr Problem validate(const Variables& v, const Host&, int devices, int num_nodes) {
    if (interactive(v)) return {};
    struct Check {
      std::string_view variable;
      int given;
      Code code;
      std::string_view flag;
    };
    for (const Check& check : {Check{"SLURM_NTASKS_PER_NODE", devices, Code::slurm_devices_mismatch, "devices"},
                               Check{"SLURM_NNODES", num_nodes, Code::slurm_num_nodes_mismatch, "num_nodes"}}) {
      const Expected<int> allocated = read_int_or(v, check.variable, check.given);
      if (!allocated) return allocated.problem;
      if (*allocated == check.given) continue;
      Problem problem(check.code, check.flag);
      problem.name(static_cast<long long>(check.given)).name(static_cast<long long>(*allocated));
      problem.detail.append("Slurm says ").append(check.variable);
      problem.nearest.append(static_cast<long long>(*allocated));
      return problem;
    }
    return {};
  }
  static constexpr Problem contradiction(const Variables& v, const Host&) {
    if (!below(v, "SLURM_PROCID", "SLURM_NTASKS")) {
      return detail::contradiction(v, {"SLURM_PROCID", "SLURM_NTASKS"}, "a task's number is below the number of tasks");
    }
    // mpirun inside a Slurm job: every process would take the batch step for its own.
    for (const std::string_view rank : {"OMPI_COMM_WORLD_RANK", "PMI_RANK"}) {
      const Integer mpi = parse_integer(v.get(rank));
      const Integer task = parse_integer(v.get("SLURM_PROCID"));
      if (!mpi.valid || !task.valid || mpi.value == task.value) continue;
      return detail::contradiction(v, {rank, "SLURM_PROCID"},
                                   "started by mpirun inside a Slurm job: LT_ENVIRONMENT=mpi says so");
    }
    return {};
  }
};

}  // namespace fabric::detail
