// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/types.h>

namespace fabric {

/// The processes that train together, as one of them sees it. `group` is null under a strategy
/// of one process, as `SingleDevice`; under others it is there for a single process, too.
struct World {
  int size = 1;
  int global_rank = 0;
  int local_rank = 0;
  int node_rank = 0;
  at::Device device = at::kCPU;  ///< Where this process's tensors live, and `group` communicates.
  c10::intrusive_ptr<c10d::ProcessGroup> group{};

  [[nodiscard]] bool is_global_zero() const { return global_rank == 0; }
};

}  // namespace fabric
