// SPDX-License-Identifier: Apache-2.0
#ifdef USE_DISTRIBUTED
#include "fabric/fabric.hpp"
#else
#include "fabric/config.hpp"
#endif

bool resolves_in_b() { return fabric::resolve({.strategy = "ddp"}, {}, {}).ok(); }
