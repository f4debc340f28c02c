// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/ATen.h>

#include "fabric/checkpoint/boxes.hpp"

namespace fabric {

/// Tensors of a checkpoint that are still on the disk. In the tree that was read, a tensor without memory (on the meta
/// device) stands for each.
class StoredTensors {
 public:
  virtual ~StoredTensors() = default;
  /// Throws DamagedCheckpoint unless that part is there and what was saved.
  virtual void check(const at::Tensor& stand_in, const Box& box) const = 0;
  /// Copies a part into `target`, which has its sizes, and any device and dtype.
  virtual void read(const at::Tensor& stand_in, const Box& box, const at::Tensor& target) const = 0;
};

}  // namespace fabric
