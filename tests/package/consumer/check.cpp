// SPDX-License-Identifier: Apache-2.0
#include <fabric/policy/rules.hpp>

static_assert(fabric::CompatibleWith<fabric::Cpu, fabric::Ddp, fabric::F32, fabric::Detected>);
static_assert(!fabric::CompatibleWith<fabric::Cpu, fabric::Fsdp, fabric::F32, fabric::Detected>);

int main() {}
