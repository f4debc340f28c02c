// SPDX-License-Identifier: Apache-2.0
// [issue-4.2] A typo in a precision.
// expect: unknown_precision<.*given<'b', ?'f', ?'1', ?'6', ?'m'.*did_you_mean<'b', ?'f', ?'1', ?'6', ?'-'
#include "fabric/config.hpp"

#ifdef FABRIC_TWIN
using F = fabric::fabric_t<"cpu", "ddp", "bf16-mixed">;
#else
using F = fabric::fabric_t<"cpu", "ddp", "bf16mixed">;
#endif
F* fabric_of_typo = nullptr;
