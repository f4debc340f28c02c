// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fabric/connector/environment/variables.hpp"

namespace fabric::detail {

/// Kubeflow's PyTorchJob: one process a node. Its variables are those of any launcher, so that it cannot be detected.
struct KubeflowReader {
  static constexpr Required<4> required{"MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"};

  static constexpr bool detected(const Variables&, const Host&) { return false; }
  static constexpr Problem construct(const Variables&, const Host&) { return {}; }
  static constexpr Expected<HostName> main_address(const Variables& v, const Host&) {
    if (const Found<Variable> user = v.find("MASTER_ADDR")) return HostName(user->value);
    Problem problem(Code::env_var_missing, "MASTER_ADDR", "MASTER_ADDR");
    list_faults(problem, v, required, 4);
    return problem;
  }
  static constexpr Expected<int> main_port(const Variables& v, const Host&) {
    return read_int(v, "MASTER_PORT", required);
  }
  static constexpr Expected<int> world_size(const Variables& v, const Host&) {
    return read_int(v, "WORLD_SIZE", required);
  }
  static constexpr Expected<int> global_rank(const Variables& v, const Host&) { return read_int(v, "RANK", required); }
  static constexpr Expected<int> local_rank(const Variables&, const Host&) { return 0; }
  static constexpr Expected<int> node_rank(const Variables& v, const Host& host) { return global_rank(v, host); }
  static constexpr Problem validate(const Variables&, const Host&, int, int) { return {}; }
  static constexpr Problem contradiction(const Variables& v, const Host&) {
    if (below(v, "RANK", "WORLD_SIZE")) return {};
    return detail::contradiction(v, {"RANK", "WORLD_SIZE"}, "a rank is below the world size");
  }
};

/// Started by hand, or by this library's own launcher, which sets LOCAL_RANK for the processes that it starts. The
/// world size and global rank are the strategy's to say.
struct LocalReader {
  static constexpr bool detected(const Variables&, const Host&) { return true; }
  static constexpr Problem construct(const Variables&, const Host&) { return {}; }
  static constexpr Expected<HostName> main_address(const Variables& v, const Host&) {
    return HostName(v.get("MASTER_ADDR", "127.0.0.1"));
  }
  static constexpr Expected<int> main_port(const Variables& v, const Host&) { return read_int_or(v, "MASTER_PORT", 0); }
  static constexpr Expected<int> world_size(const Variables&, const Host&) { return 1; }
  static constexpr Expected<int> global_rank(const Variables&, const Host&) { return 0; }
  static constexpr Expected<int> local_rank(const Variables& v, const Host&) { return read_int_or(v, "LOCAL_RANK", 0); }
  static constexpr Expected<int> node_rank(const Variables& v, const Host&) {
    return read_int_or(v, v.has("NODE_RANK") ? "NODE_RANK" : "GROUP_RANK", 0);
  }
  static constexpr Problem validate(const Variables&, const Host&, int, int) { return {}; }
  static constexpr Problem contradiction(const Variables&, const Host&) { return {}; }
};

/// XLA's own runtime, which knows its ranks only after launch and needs no main address.
struct XlaReader {
  static constexpr bool detected(const Variables&, const Host& host) { return host.tpu_devices > 0; }
  static constexpr Problem construct(const Variables&, const Host& host) {
    return host.xla_engine ? Problem{} : Problem(Code::missing_torch_xla, "environment");
  }
  static constexpr Expected<HostName> main_address(const Variables&, const Host&) {
    return Problem(Code::not_implemented, "main_address");
  }
  static constexpr Expected<int> main_port(const Variables&, const Host&) {
    return Problem(Code::not_implemented, "main_port");
  }
  static constexpr Expected<int> world_size(const Variables&, const Host&) { return 1; }
  static constexpr Expected<int> global_rank(const Variables&, const Host&) { return 0; }
  static constexpr Expected<int> local_rank(const Variables&, const Host&) { return 0; }
  static constexpr Expected<int> node_rank(const Variables&, const Host&) { return 0; }
  static constexpr Problem validate(const Variables&, const Host&, int, int) { return {}; }
  static constexpr Problem contradiction(const Variables&, const Host&) { return {}; }
};

}  // namespace fabric::detail
