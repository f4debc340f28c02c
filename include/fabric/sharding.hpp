// SPDX-License-Identifier: Apache-2.0
#pragma once

/// The strategies that shard: Fsdp, DeepSpeed<1>, <2> and <3>, and ModelParallel. To be included before the first
/// Fabric of one of them.

#include "fabric/fabric.hpp"
#include "fabric/strategy/sharded.hpp"
