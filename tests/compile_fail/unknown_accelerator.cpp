// SPDX-License-Identifier: Apache-2.0
// [issue-4.2] A type is about one kind of GPU: "gpu" names none.
// expect: unknown_accelerator<.*given<'g', ?'p', ?'u'>.*did_you_mean<'c', ?'u', ?'d', ?'a'>.*fabric::Mps
#include "fabric/config.hpp"

#ifdef FABRIC_TWIN
using F = fabric::fabric_t<"cuda", "ddp", "32-true">;
#else
using F = fabric::fabric_t<"gpu", "ddp", "32-true">;
#endif
F* fabric_of_typo = nullptr;
