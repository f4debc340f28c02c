// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fabric/connector/environment/variables.hpp"

namespace fabric::detail {

/// torchrun: RANK, WORLD_SIZE, LOCAL_RANK and GROUP_RANK say everything.
struct TorchElasticReader {
  static constexpr Required<3> required{"WORLD_SIZE", "RANK", "LOCAL_RANK"};

  static constexpr bool detected(const Variables& v, const Host&) { return v.has("TORCHELASTIC_RUN_ID"); }
  static constexpr Problem construct(const Variables&, const Host&) { return {}; }

  static constexpr Expected<HostName> main_address(const Variables& v, const Host&) {
    return HostName(v.get("MASTER_ADDR", "127.0.0.1"));
  }
  static constexpr Expected<int> main_port(const Variables& v, const Host&) {
    return read_int_or(v, "MASTER_PORT", 12910);
  }
  static constexpr Expected<int> world_size(const Variables& v, const Host&) {
    return read_int(v, "WORLD_SIZE", required);
  }
  static constexpr Expected<int> global_rank(const Variables& v, const Host&) { return read_int(v, "RANK", required); }
  static constexpr Expected<int> local_rank(const Variables& v, const Host&) {
    return read_int(v, "LOCAL_RANK", required);
  }
  static constexpr Expected<int> node_rank(const Variables& v, const Host&) { return read_int_or(v, "GROUP_RANK", 0); }

  static constexpr Problem validate(const Variables& v, const Host& host, int devices, int num_nodes) {
    const Expected<int> world = world_size(v, host);
    if (!world) return world.problem;
    if (static_cast<long long>(devices) * num_nodes == *world) return {};
    Problem problem(Code::torchelastic_world_size_mismatch, "devices");
    problem.name(static_cast<long long>(devices))
        .name(static_cast<long long>(num_nodes))
        .name(static_cast<long long>(*world));
    problem.detail.append("torchrun's --nproc-per-node is devices, its --nnodes num_nodes");
    return problem;
  }
  static constexpr Problem contradiction(const Variables& v, const Host&) {
    if (!below(v, "RANK", "WORLD_SIZE"))
      return detail::contradiction(v, {"RANK", "WORLD_SIZE"}, "a rank is below the world size");
    if (!below(v, "LOCAL_RANK", "LOCAL_WORLD_SIZE")) {
      return detail::contradiction(v, {"LOCAL_RANK", "LOCAL_WORLD_SIZE"}, "a local rank is below the local world size");
    }
    return {};
  }
};

}  // namespace fabric::detail
