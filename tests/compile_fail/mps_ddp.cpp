// SPDX-License-Identifier: Apache-2.0
//
// [issue-3.2] Mps drives one device.
// expect: refused<.*Fabric<.*Mps, .*Ddp, .*F32.*mps_drives_one_device.*use_instead<.*Fabric<.*Mps, .*SingleDevice, .*F32
#include <fabric/policy/diagnose.hpp>
#ifdef FABRIC_TWIN
static_assert(fabric::diagnose<fabric::Mps, fabric::SingleDevice, fabric::F32>());
#else
static_assert(fabric::diagnose<fabric::Mps, fabric::Ddp, fabric::F32>());
#endif
