// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <map>
#include <string>
#include <vector>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "fabric/comm/process_group.hpp"
#include "fabric/comm/reason.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/error.hpp"

namespace fabric {
namespace detail {

/// "0, 2, 4".
[[nodiscard]] inline std::string listed(const std::vector<int>& ranks) {
  std::string text;
  for (const int rank : ranks) text += (text.empty() ? "" : ", ") + std::to_string(rank);
  return text;
}

/// Throws fabric::Error unless the ranks are some of the world's, each once.
inline void check_ranks(const World& world, const std::vector<int>& ranks, const std::string& where) {
  std::vector<int> sorted = ranks;
  std::sort(sorted.begin(), sorted.end());
  const bool in_world = !sorted.empty() && sorted.front() >= 0 && sorted.back() < world.size;
  if (in_world && std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end()) return;
  throw Error(where + ": the ranks given are [" + listed(ranks) + "]; legal are one or more of 0 to " +
              std::to_string(world.size - 1) + ", each at most once");
}

/// Waits until all ranks of a group have come here. A rank that does not is named, which gloo and NCCL do not do.
inline void meet(c10d::Store& store, const std::vector<int>& ranks, int rank, std::chrono::milliseconds timeout,
                 const std::string& where) {
  const auto key_of = [](int member) { return "here/" + std::to_string(member); };
  store.set(key_of(rank), std::vector<std::uint8_t>{1});
  // One key that all wait for, so that the store is not asked for each rank by each rank.
  if (store.add("come", 1) == static_cast<std::int64_t>(ranks.size())) store.set("all", std::vector<std::uint8_t>{1});
  try {
    store.wait({"all"}, timeout);
  } catch (const std::exception& error) {
    std::vector<int> missing;
    for (const int member : ranks) {
      if (!store.check({key_of(member)})) missing.push_back(member);
    }
    throw Error(where + ": not all of its ranks came within " + std::to_string(timeout.count()) + " ms" +
                (missing.empty() ? std::string() : "; missing: " + listed(missing)) +
                ". All of them call it, in the same order as their other groups. " + reason_of(error));
  }
}

/// How the world's own group communicates, for a group of some of its ranks.
[[nodiscard]] inline GroupOptions options_like(const World& world) {
  GroupOptions options;
  c10::intrusive_ptr<c10d::Backend> backend = world.group->getBackend(world.device.type());
  if (const auto wrapper = c10::dynamic_intrusive_pointer_cast<c10d::ProcessGroupWrapper>(backend)) {
    options.detect_desync = true;
    backend = wrapper->getWrappedPg();
  }
  if (const auto gloo = c10::dynamic_intrusive_pointer_cast<c10d::ProcessGroupGloo>(backend)) {
    options.timeout = gloo->getOptions()->timeout;
    options.transports = gloo->getOptions()->devices;
  }
#ifdef USE_C10D_NCCL
  if (const auto nccl = c10::dynamic_intrusive_pointer_cast<c10d::ProcessGroupNCCL>(backend)) {
    options.timeout = nccl->getOptions()->timeout;
  }
#endif
  return options;
}

}  // namespace detail

/// Makes a process group of some ranks of `world`; the rank in it is the place in `ranks`. It communicates as the
/// world's group does (gloo or NCCL, the same timeout), on connections of its own. Those ranks all call this with the
/// same arguments, and make the groups that they share in the same order; other ranks may call it too, and get null, as
/// does a world without a group. `name` appears in error messages, and may be used again.
///
/// Waits until all have come, at most `timeout` (by default, the world's): then throws fabric::Error with the ranks
/// that have not.
[[nodiscard]] inline c10::intrusive_ptr<c10d::ProcessGroup> make_subgroup(
    const World& world, const std::vector<int>& ranks, const std::string& name,
    std::chrono::milliseconds timeout = std::chrono::milliseconds::zero()) {
  const std::string where = "fabric: make_subgroup '" + name + "'";
  detail::check_ranks(world, ranks, where);
  const auto place = std::find(ranks.begin(), ranks.end(), world.global_rank);
  if (!world.group || place == ranks.end()) return {};

  // Ranks that share groups make them in the same order, so that equal numbers meet.
  static std::map<std::string, int> made;
  std::string key = "subgroup/" + name + "/" + detail::listed(ranks);
  key += "/" + std::to_string(made[world.group->getGroupName() + "/" + key]++);

  GroupOptions options = detail::options_like(world);
  options.store = world.group->getStore();
  options.name = key;
  c10d::PrefixStore meeting("meet/" + key, options.store);
  detail::meet(meeting, ranks, world.global_rank, timeout.count() > 0 ? timeout : options.timeout, where);

  World members = world;
  members.size = static_cast<int>(ranks.size());
  members.global_rank = static_cast<int>(place - ranks.begin());
  auto group = make_process_group(members, world.device, options);
  group->setGroupName(world.group->getGroupName() + "/" + key);
  return group;
}

/// A group as a world of its own, for the collectives that take one: size and rank are those in the group.
[[nodiscard]] inline World world_of(const World& world, const c10::intrusive_ptr<c10d::ProcessGroup>& group) {
  World members = world;
  members.group = group;
  members.size = group ? group->getSize() : 1;
  members.global_rank = group ? group->getRank() : 0;
  return members;
}

}  // namespace fabric
