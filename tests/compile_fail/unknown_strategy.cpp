// SPDX-License-Identifier: Apache-2.0
// [issue-4.2] A typo in a type from strings says what was given, meant and legal, in one line.
// expect: unknown_strategy<.*given<'d', ?'p', ?'d'>.*did_you_mean<'d', ?'d', ?'p'>.*legal<.*fabric::Ddp
#include "fabric/config.hpp"

#ifdef FABRIC_TWIN
using F = fabric::fabric_t<"cuda", "ddp", "bf16-mixed">;
#else
using F = fabric::fabric_t<"cuda", "dpd", "bf16-mixed">;
#endif
F* fabric_of_typo = nullptr;
