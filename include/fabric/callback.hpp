// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace fabric {

/// The base of callbacks. A program declares its own hooks in a class derived from it, and `Fabric::call` runs one of
/// them on every callback that has it: `fabric.call(&TrainingHooks::on_epoch_end, epoch)`.
class Callback {
 public:
  virtual ~Callback() = default;
};

}  // namespace fabric
