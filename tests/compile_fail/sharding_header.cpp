// SPDX-License-Identifier: Apache-2.0
//
// [issue-8.1] The strategies that shard are in a header of their own.
// needs: torch
// expect: include_fabric_sharding_hpp<fabric::Fabric<fabric::Cpu, fabric::DeepSpeed<3
#include <fabric/fabric.hpp>
#ifdef FABRIC_TWIN
#include <fabric/sharding.hpp>
#endif
void use() { fabric::Fabric<fabric::Cpu, fabric::DeepSpeed<3>, fabric::F32> fabric; }
