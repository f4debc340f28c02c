// SPDX-License-Identifier: Apache-2.0
// [issue-4.1] 16.0 is no precision.
// expect: deleted
#include "fabric/config.hpp"

#ifdef FABRIC_TWIN
constexpr fabric::PrecisionFlag flag(16);
#else
constexpr fabric::PrecisionFlag flag(16.0);
#endif
static_assert(flag.number == 16);
