// SPDX-License-Identifier: Apache-2.0
#ifdef USE_DISTRIBUTED
#include "fabric/fabric.hpp"
#else
#include "fabric/config.hpp"
#endif

bool resolves_in_b();

bool resolves_in_a() { return fabric::resolve({.strategy = "ddp"}, {}, {}).ok(); }

int main() { return resolves_in_a() == resolves_in_b() ? 0 : 1; }
