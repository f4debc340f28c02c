// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "support/loop.hpp"

namespace bench {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

/// All-reduces the gradients after backward, one after the other.
Loop by_hand_each(const Size& size, const Group& group);
/// All-reduces them after backward as one flat tensor.
Loop by_hand_flat(const Size& size, const Group& group);

}  // namespace bench
