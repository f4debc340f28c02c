// SPDX-License-Identifier: Apache-2.0
//
// [issue-3.2] Autocast to half floats needs a GPU.
// expect: refused<.*Fabric<.*Cpu, .*SingleDevice, .*F16Mixed.*f16_autocast_needs_gpu.*use_instead<.*Fabric<.*Cpu, .*SingleDevice, .*BF16Mixed
#include <fabric/policy/diagnose.hpp>
#ifdef FABRIC_TWIN
static_assert(fabric::diagnose<fabric::Cpu, fabric::SingleDevice, fabric::BF16Mixed>());
#else
static_assert(fabric::diagnose<fabric::Cpu, fabric::SingleDevice, fabric::F16Mixed>());
#endif
