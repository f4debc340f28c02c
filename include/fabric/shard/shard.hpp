// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

#include <torch/types.h>

namespace fabric {

/// This rank's part of a parameter: the elements [begin, end) in row-major order, which may be none.
struct Shard {
  std::string name{};      ///< Of the parameter in its module.
  at::Tensor parameter{};  ///< The module's own tensor: its sizes are right, its memory may not be there.
  at::Tensor master{};     ///< (end - begin): what the optimizer changes, in the dtype in which it does.
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

}  // namespace fabric
