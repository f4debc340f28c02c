// SPDX-License-Identifier: Apache-2.0
// [issue-4.2] Names that exist, but do not go together.
// expect: refused<fabric::Fabric<fabric::Mps, fabric::Ddp.*mps_drives_one_device.*Fabric<fabric::Mps, fabric::Sin
#include "fabric/config.hpp"

#ifdef FABRIC_TWIN
using F = fabric::fabric_t<"mps", "single_device", "32-true">;
#else
using F = fabric::fabric_t<"mps", "ddp", "32-true">;
#endif
F* fabric_of_refused = nullptr;
