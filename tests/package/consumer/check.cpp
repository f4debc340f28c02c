// SPDX-License-Identifier: Apache-2.0
#include <fabric/config.hpp>

static_assert(fabric::CompatibleWith<fabric::Cpu, fabric::Ddp, fabric::F32>);
static_assert(!fabric::CompatibleWith<fabric::Cpu, fabric::Fsdp, fabric::F32>);

int main() {
  const auto resolution = fabric::resolve({.accelerator = "cpu", .strategy = "ddp", .devices = 2}, {}, {});
  return resolution.ok() && resolution.strategy == fabric::Ddp::facts ? 0 : 1;
}
