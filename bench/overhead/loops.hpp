// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "support/loop.hpp"

namespace bench {

Loop by_hand(const Size& size);
Loop with_fabric(const Size& size);

}  // namespace bench
