// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fabric/connector/environment/variables.hpp"
#include "fabric/connector/lsf_hosts.hpp"

namespace fabric::detail {

/// LSF's jsrun. The hosts come from the rank file, or from LSB_MCPU_HOSTS where no rank file is named.
struct LsfReader {
  static constexpr Required<3> required{"JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK"};

  static constexpr bool detected(const Variables& v, const Host&) {
    return v.has("LSB_JOBID") && (v.has("LSB_DJOB_RANKFILE") || v.has("LSB_MCPU_HOSTS")) &&
           v.has("JSM_NAMESPACE_LOCAL_RANK") && v.has("JSM_NAMESPACE_SIZE");
  }

  static constexpr Expected<LsfHosts> hosts(const Variables& v, const Host& host) {
    const Found<Variable> path = v.find("LSB_DJOB_RANKFILE");
    if (!path) {
      if (const Found<Variable> mcpu = v.find("LSB_MCPU_HOSTS")) return LsfHosts::from_mcpu_hosts(mcpu->value);
      Problem problem(Code::lsf_rankfile_var_missing, "LSB_DJOB_RANKFILE");
      problem.detail.append("neither LSB_DJOB_RANKFILE nor LSB_MCPU_HOSTS is set: was the program started by jsrun?");
      return problem;
    }
    if (path->value.empty()) return Problem(Code::lsf_rankfile_var_empty, "LSB_DJOB_RANKFILE");
    if (const Found<HostFile> file = host.file(path->value)) return LsfHosts::from_rank_file(file->text);
    Problem problem(Code::lsf_rankfile_not_found, "LSB_DJOB_RANKFILE");
    problem.detail.append(path->value.substr(0, 100));
    return problem;
  }

  static constexpr Problem construct(const Variables& v, const Host& host) {
    const Expected<LsfHosts> all = hosts(v, host);
    if (!all) return all.problem;
    if (all->main_host().empty()) {
      Problem problem(Code::lsf_rankfile_too_short,
                      v.has("LSB_DJOB_RANKFILE") ? "LSB_DJOB_RANKFILE" : "LSB_MCPU_HOSTS");
      problem.detail.append("only the launch node is listed");
      return problem;
    }
    if (const Expected<int> port = main_port(v, host); !port) return port.problem;
    return node_rank(v, host).problem;
  }

  static constexpr Expected<HostName> main_address(const Variables& v, const Host& host) {
    if (const Found<Variable> user = v.find("MASTER_ADDR")) return HostName(user->value);
    const Expected<LsfHosts> all = hosts(v, host);
    if (!all) return all.problem;
    return HostName(all->main_host());
  }
  /// MASTER_PORT, or 10000 plus the last three digits of the job's number, so that all tasks agree.
  static constexpr Expected<int> main_port(const Variables& v, const Host&) {
    const Found<Variable> user = v.find("MASTER_PORT");
    const Found<Variable> variable = user ? user : v.find("LSB_JOBID");
    if (!variable) {
      Problem problem(Code::lsf_jobid_missing, "LSB_JOBID");
      problem.detail.append("missing: MASTER_PORT and LSB_JOBID; one of them gives the port");
      return problem;
    }
    const Integer number = parse_integer(variable->value);
    if (number.valid) return user ? to_int(number.value) : to_int(number.value % 1000) + 10000;
    Problem problem(Code::lsf_port_not_int, variable->name);
    problem.detail.append(variable->name).append(" is '").append(variable->value.substr(0, 80)).append("'");
    return problem;
  }
  static constexpr Expected<int> world_size(const Variables& v, const Host&) {
    return read(v, "JSM_NAMESPACE_SIZE", Code::lsf_world_size_missing);
  }
  static constexpr Expected<int> global_rank(const Variables& v, const Host&) {
    return read(v, "JSM_NAMESPACE_RANK", Code::lsf_global_rank_missing);
  }
  static constexpr Expected<int> local_rank(const Variables& v, const Host&) {
    return read(v, "JSM_NAMESPACE_LOCAL_RANK", Code::lsf_local_rank_missing);
  }
  static constexpr Expected<int> node_rank(const Variables& v, const Host& host) {
    const Expected<LsfHosts> all = hosts(v, host);
    if (!all) return all.problem;
    const int rank = all->node_rank(host.hostname);
    if (rank >= 0) return rank;
    Problem problem(Code::lsf_host_not_in_rankfile,
                    v.has("LSB_DJOB_RANKFILE") ? "LSB_DJOB_RANKFILE" : "LSB_MCPU_HOSTS");
    problem.detail.append("it does not list this host, ").append(host.hostname.substr(0, 80));
    return problem;
  }

  static constexpr Problem validate(const Variables&, const Host&, int, int) { return {}; }
  static constexpr Problem contradiction(const Variables& v, const Host&) {
    if (below(v, "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE")) return {};
    return detail::contradiction(v, {"JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"},
                                 "a rank is below the number of tasks");
  }

 private:
  static constexpr Expected<int> read(const Variables& v, std::string_view name, Code missing) {
    Expected<int> number = read_int(v, name, required);
    if (number.problem.code == Code::env_var_missing) {
      number.problem.code = missing;
      number.problem.names = {};
    }
    return number;
  }
};

}  // namespace fabric::detail
