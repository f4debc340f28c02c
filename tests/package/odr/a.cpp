// SPDX-License-Identifier: Apache-2.0
#ifdef USE_DISTRIBUTED
#include "fabric/checkpoint.hpp"
#include "fabric/comm/device_mesh.hpp"
#include "fabric/fabric.hpp"
#include "fabric/module/activation_checkpointing.hpp"
#include "fabric/module/deferred_init.hpp"
#include "fabric/precision/bitsandbytes.hpp"
#include "fabric/precision/transformer_engine.hpp"
#include "fabric/sharding.hpp"
#else
#include "fabric/config.hpp"
#endif

bool resolves_in_b();

bool resolves_in_a() { return fabric::resolve({.strategy = "ddp"}, {}, {}).ok(); }

int main() { return resolves_in_a() == resolves_in_b() ? 0 : 1; }
