// SPDX-License-Identifier: Apache-2.0
//
// [issue-3.2] Fsdp shards over GPUs.
// expect: refused<.*Fabric<.*Cpu, .*Fsdp, .*F32.*fsdp_needs_gpus.*use_instead<.*Fabric<.*Cpu, .*Ddp, .*F32
#include <fabric/policy/diagnose.hpp>
#ifdef FABRIC_TWIN
static_assert(fabric::diagnose<fabric::Cuda, fabric::Fsdp, fabric::F32>());
#else
static_assert(fabric::diagnose<fabric::Cpu, fabric::Fsdp, fabric::F32>());
#endif
