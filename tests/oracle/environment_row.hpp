// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <map>
#include <regex>
#include <string>
#include <string_view>

#include "fabric/connector/environment.hpp"
#include "oracle/devices_row.hpp"
#include "oracle/row_host.hpp"

namespace oracle {

inline fabric::EnvironmentKind environment_kind(std::string_view name) {
  static const std::map<std::string_view, fabric::EnvironmentKind> kinds{
      {"TorchElasticEnvironment", fabric::EnvironmentKind::torchelastic},
      {"SLURMEnvironment", fabric::EnvironmentKind::slurm},
      {"LSFEnvironment", fabric::EnvironmentKind::lsf},
      {"MPIEnvironment", fabric::EnvironmentKind::mpi},
      {"KubeflowEnvironment", fabric::EnvironmentKind::kubeflow},
      {"XLAEnvironment", fabric::EnvironmentKind::xla},
      {"LightningEnvironment", fabric::EnvironmentKind::local}};
  return kinds.at(name);
}

/// Of what the reference takes for the first host of a Slurm node list: the text with brackets cut to their first
/// number, from the first bracket to the last one when there is a range or comma in between, up to a space or comma.
inline std::string reference_first_host(const std::string& list) {
  static const std::regex several(R"(\[(.*?)[,-].*\])");
  static const std::regex one(R"(\[(.*?)\])");
  const std::string cut = std::regex_replace(std::regex_replace(list, several, "$1"), one, "$1");
  return cut.substr(0, cut.find_first_of(" ,"));
}

/// The first host of a well-formed list: its first name, each bracket replaced by its first number.
inline std::string first_host(const std::string& list) {
  std::string name;
  bool inside = false;
  bool first_number = false;
  for (const char c : list) {
    if (!inside && (c == ',' || c == ' ')) {
      if (!name.empty()) break;
      continue;
    }
    if (c == '[') inside = first_number = true;
    if (c == ',' || c == '-') first_number &= !inside;
    if (c != '[' && c != ']' && (!inside || first_number)) name += c;
    if (c == ']') inside = false;
  }
  return name;
}

/// A Slurm node list that the reference misreads: it takes another host than the list's first, or finds one where the
/// list is none.
inline bool slurm_nodelist_misread(const std::string& list) {
  const bool unbalanced = std::count(list.begin(), list.end(), '[') != std::count(list.begin(), list.end(), ']');
  return list.empty() || unbalanced || list.find("[]") != std::string::npos ||
         reference_first_host(list) != first_host(list);
}

/// Whether Slurm's environment is made at all: several tasks need to know how many run on a node.
inline bool slurm_is_made(const Json& env) {
  const fabric::Integer tasks = fabric::parse_integer(env.value("SLURM_NTASKS", "1"));
  return tasks.valid && (tasks.value <= 1 || env.contains("SLURM_NTASKS_PER_NODE"));
}

/// The host of rank 0 in a row's LSF rank file; nothing where LSF's environment is not made.
inline std::string lsf_main_host(const Json& row) {
  const Json& env = row["env"];
  const std::string path = env.value("LSB_DJOB_RANKFILE", "");
  if (!row["host"].contains("files") || !row["host"]["files"].contains(path)) return {};
  const Json& lines = row["host"]["files"][path];
  if (lines.size() < 2 || !fabric::parse_integer(env.value("MASTER_PORT", env.value("LSB_JOBID", ""))).valid) return {};
  const std::string hostname = row["host"].value("hostname", "h0");
  for (std::size_t i = 1; i < lines.size(); ++i) {
    const std::string line = lines[i];
    if (fabric::trimmed(line) == hostname) return std::string(fabric::trimmed(lines[1].get_ref<const std::string&>()));
  }
  return {};
}

/// The kind of difference that an environment row shows (docs/differences.md), or nothing.
inline std::string_view environment_difference(const Json& row) {
  const Json& env = row["env"];
  const std::string name = row["class"];
  if (name == "LSFEnvironment" && env.contains("MASTER_ADDR")) {
    const std::string main = lsf_main_host(row);
    if (!main.empty() && main != env["MASTER_ADDR"].get<std::string>()) return "lsf_master_addr";
  }
  if (name == "SLURMEnvironment" && !env.contains("MASTER_ADDR") && slurm_is_made(env)) {
    if (env.contains("SLURM_NODELIST")) {
      if (slurm_nodelist_misread(env["SLURM_NODELIST"])) return "slurm_nodelist_misread";
    } else if (env.contains("SLURM_JOB_NODELIST") && first_host(env["SLURM_JOB_NODELIST"]) != "127.0.0.1") {
      return "slurm_job_nodelist";
    }
  }
  return {};
}

/// A value, or the error of reading it, as the rows write it.
template <class T>
Json value_of(const fabric::Expected<T>& read) {
  if (read) {
    if constexpr (std::is_same_v<T, int>)
      return *read;
    else
      return std::string(read->view());
  }
  Json error{{"error", std::string(fabric::name_of(read.problem.code))}};
  if (!read.problem.names.empty()) error["names"] = names_of(read.problem.names);
  return error;
}

/// The outcome of an environment row.
inline Json environment_answer(const Json& row) {
  const RowHost at(row);
  fabric::Host host = at.host();
  host.mpi.main_port = 23456;  // the port that every simulated rank 0 finds free
  const fabric::Variables variables = at.variables();
  const fabric::EnvironmentKind kind = environment_kind(row["class"].get_ref<const std::string&>());
  const auto warning_names = [](unsigned bits) {
    Json names = Json::array();
    if (bits & 1U) names.push_back("master_addr_default");
    if (bits & 2U) names.push_back("master_port_default");
    if (bits & 4U) names.push_back("srun_not_used");
    return names;
  };

  Json outcome;
  outcome["detect"] = kind == fabric::EnvironmentKind::kubeflow ? Json{{"error", "kubeflow_not_detectable"}}
                                                                : Json(fabric::detects(kind, variables, host));
  const unsigned warnings = fabric::Environment(kind, variables, host).warnings();
  if (warnings & 4U) outcome["detect_warnings"] = warning_names(4);
  if (warnings != 0) outcome["warnings"] = warning_names(warnings);

  const fabric::Expected<fabric::Environment> constructed = fabric::construct_environment(kind, variables, host);
  if (!constructed) {
    outcome["construct"] = value_of(fabric::Expected<int>(constructed.problem));
    return outcome;
  }
  fabric::Environment environment = *constructed;
  outcome["construct"] = "ok";
  outcome["creates_processes_externally"] = environment.creates_processes_externally();
  outcome["main_address"] = value_of(environment.main_address());
  const fabric::Expected<int> port = environment.main_port();
  outcome["main_port"] = port && *port == 0 ? Json("random_free_port") : value_of(port);
  outcome["world_size"] = value_of(environment.world_size());
  outcome["global_rank"] = value_of(environment.global_rank());
  outcome["local_rank"] = value_of(environment.local_rank());
  outcome["node_rank"] = value_of(environment.node_rank());
  if (kind == fabric::EnvironmentKind::slurm) {
    const fabric::Found<fabric::Variable> name = environment.job_name();
    outcome["job_name"] = name ? Json(std::string(name->value)) : Json();
    outcome["job_id"] = environment.job_id() >= 0 ? Json(environment.job_id()) : Json();
    outcome["auto_requeue"] = true;
  }
  for (const auto& [key, devices, nodes] :
       {std::tuple{"1x1", 1, 1}, {"2x1", 2, 1}, {"2x2", 2, 2}, {"4x1", 4, 1}, {"4x2", 4, 2}}) {
    const fabric::Problem problem = environment.validate_settings(devices, nodes);
    outcome["validate"][key] =
        problem.code == fabric::Code::none ? Json("ok") : value_of(fabric::Expected<int>(problem));
  }
  environment.set_world_size(5);
  environment.set_global_rank(3);
  outcome["after_set_5_3"] = {value_of(environment.world_size()), value_of(environment.global_rank())};
  if (environment.publishes_address()) {
    if (const auto address = environment.main_address(); address && variables.get("MASTER_ADDR") != address->view()) {
      outcome["env_set"]["MASTER_ADDR"] = std::string(address->view());
    }
    if (port && !variables.has("MASTER_PORT")) outcome["env_set"]["MASTER_PORT"] = std::to_string(*port);
    if (!variables.has("MASTER_ADDR") && environment.main_address() && environment.main_address()->empty()) {
      outcome["env_set"]["MASTER_ADDR"] = "";
    }
  }
  return outcome;
}

}  // namespace oracle
