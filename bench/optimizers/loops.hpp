// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "gpt.hpp"
#include "support/loop.hpp"

namespace bench {

inline constexpr double adamw_lr = 1e-3;
inline constexpr double max_norm = 1.0;

Loop by_hand(const Size& size);
Loop by_hand(const GptSize& size);
Loop with_fabric(const Size& size);
Loop with_fabric(const GptSize& size);

}  // namespace bench
