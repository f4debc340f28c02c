// SPDX-License-Identifier: Apache-2.0
//
// [issue-3.2] Fabric itself refuses what the rules refuse, and what is legal but has no code yet; never silently
// something else. The rules and the connector know the latter.
// needs: torch
// expect: refused<.*Fabric<.*Mps, .*Ddp, .*F32.*mps_drives_one_device.*use_instead<.*Fabric<.*Mps, .*SingleDevice, .*F32
// expect: engine_not_written_yet<.*Fabric<.*Cuda, .*DataParallel, .*BF16Mixed.*use_instead<.*Fabric<.*Ddp, .*BF16Mixed
// expect: precision_not_written_yet<.*Fabric<.*Cpu, .*SingleDevice, .*Posit[,>].*use_instead<.*Fabric<.*Cpu, .*SingleDevice, .*BF16Mixed
#include <fabric/fabric.hpp>
using namespace fabric;

struct Posit {
  static constexpr PrecisionFacts facts{.name = "Posit", .flag = "posit"};
};

#ifdef FABRIC_TWIN
static_assert(CompatibleWith<Cuda, DataParallel, BF16Mixed> && CompatibleWith<Cpu, SingleDevice, Posit>);
Fabric<Cpu, SingleDevice, F32> nearest;
#else
Fabric<Mps, Ddp, F32> refused_by_a_rule;
Fabric<Cuda, DataParallel, BF16Mixed> without_engine;
Fabric<Cpu, SingleDevice, Posit> without_precision;
#endif
