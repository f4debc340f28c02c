// SPDX-License-Identifier: Apache-2.0
//
// [issue-3.2] XLA devices have strategies of their own.
// expect: refused<.*Fabric<.*Xla, .*Ddp, .*F32.*xla_accelerator_needs_xla_strategy.*use_instead<.*Fabric<.*Xla, .*XlaDdp, .*F32
#include <fabric/policy/diagnose.hpp>
#ifdef FABRIC_TWIN
static_assert(fabric::diagnose<fabric::Xla, fabric::XlaDdp, fabric::F32>());
#else
static_assert(fabric::diagnose<fabric::Xla, fabric::Ddp, fabric::F32>());
#endif
