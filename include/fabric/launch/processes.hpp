// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "fabric/comm/process_group.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/connector/environment.hpp"
#include "fabric/connector/message.hpp"
#include "fabric/connector/probe.hpp"
#include "fabric/connector/selection.hpp"
#include "fabric/error.hpp"
#include "fabric/launch/children.hpp"

namespace fabric {
namespace detail {

template <class T>
T value_or_throw(const Expected<T>& expected) {
  if (!expected) throw Error(message(expected.problem));
  return expected.value;
}

/// Starts this node's other processes and tells them, and any second Fabric in this one, where to meet.
inline void start_children(const World& world, int local_size, const Rendezvous& where) {
  const auto settings_of = [&](int local_rank) {
    return std::vector<Children::Setting>{{"MASTER_ADDR", where.address},
                                          {"MASTER_PORT", std::to_string(where.port)},
                                          {"NODE_RANK", std::to_string(world.node_rank)},
                                          {"LOCAL_RANK", std::to_string(local_rank)},
                                          {"WORLD_SIZE", std::to_string(world.size)}};
  };
  std::vector<std::vector<Children::Setting>> settings;
  for (int local_rank = 1; local_rank < local_size; ++local_rank) settings.push_back(settings_of(local_rank));
  Children::of_this_process().start(settings);
  for (const auto& [name, value] : settings_of(0)) setenv(name.c_str(), value.c_str(), 1);
}

/// Processes on one node share its cores, unless the user has divided them already.
inline void divide_threads(int local_size) {
  if (local_size < 2 || std::getenv("OMP_NUM_THREADS") != nullptr) return;
  at::set_num_threads(std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / local_size));
}

}  // namespace detail

/// Brings this process into the world that `selection` describes: as a process that a launcher (torchrun, srun, ...) or
/// a parent started, or as local rank 0 that starts the others. Then makes the process group.
///
/// Throws fabric::Error for variables that are missing or contradict the flags, `c10::Error` when the other ranks do
/// not come within `timeout`.
[[nodiscard]] inline World join_world(const Selection& selection, at::Device device,
                                      std::chrono::milliseconds timeout) {
  Children::join_parent();
  const CapturedVariables captured = capture_variables();
  const Variables variables = captured;
  const ProbedHost probed = probe_host(variables);
  const Host& host = probed;
  auto environment = detail::value_or_throw(construct_environment(selection.environment.kind, variables, host));

  const int local_size = selection.devices.count;
  World world;
  world.node_rank = detail::value_or_throw(environment.node_rank());
  world.local_rank = detail::value_or_throw(environment.local_rank());
  environment.set_world_size(local_size * selection.num_nodes);
  environment.set_global_rank(world.node_rank * local_size + world.local_rank);
  world.size = detail::value_or_throw(environment.world_size());
  world.global_rank = detail::value_or_throw(environment.global_rank());
  const bool custom = selection.environment.kind == EnvironmentKind::custom;
  if (custom) {
    world.size = selection.world_size.value;
    world.global_rank = selection.global_rank.value;
    world.local_rank = selection.local_rank.value;
    world.node_rank = selection.node_rank.value;
  }
  const bool external = custom ? selection.external_launch : environment.creates_processes_externally();
  const Problem mismatch = environment.validate_settings(local_size, selection.num_nodes);
  if (mismatch.code != Code::none) throw Error(message(mismatch));

  // Nobody else compares these: a custom environment, and a second Fabric in a job that a first one started.
  int started = custom ? world.size : local_size * selection.num_nodes;
  if (selection.environment.kind == EnvironmentKind::local && external && variables.has("WORLD_SIZE")) {
    started = std::atoi(std::string(variables.get("WORLD_SIZE")).c_str());
  }
  if (started != local_size * selection.num_nodes) {
    throw Error("fabric: " + std::to_string(started) + " processes were started, but " + std::to_string(local_size) +
                " devices on " + std::to_string(selection.num_nodes) + " nodes are selected: make both agree");
  }

  Rendezvous where;
  where.address = std::string(detail::value_or_throw(environment.main_address()).view());
  where.port = detail::value_or_throw(environment.main_port());
  where.timeout = timeout;
  // An elastic agent serves the store itself; else global rank 0 does.
  const bool agent_serves = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True";
  where.serve = world.global_rank == 0 && !agent_serves;

  detail::divide_threads(local_size);
  if (!external) {
    // The server comes before the others are started, so that the port it took is theirs and nobody can take it
    // between.
    if (where.serve) detail::shared_store(where);
    detail::start_children(world, local_size, where);
  }
  world.group = make_process_group(world, device, where);
  return world;
}

}  // namespace fabric
