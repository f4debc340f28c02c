// SPDX-License-Identifier: Apache-2.0
//
// One byte: the host; then a line each for --accelerator, --strategy, --devices, --num-nodes, --precision and
// --environment; then NAME=VALUE lines.
#include <vector>

#include "fabric/connector/message.hpp"
#include "fabric/connector/resolve.hpp"
#include "fuzz/input.hpp"

using namespace fabric;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input input(data, size);
  const unsigned char kind = input.byte();
  const Host host{.cuda_devices = kind % 4,
                  .mps = (kind & 4U) != 0,
                  .tpu_devices = (kind & 8U) != 0 ? 4 : 0,
                  .interactive = (kind & 16U) != 0,
                  .fork = (kind & 32U) == 0,
                  .srun = (kind & 64U) != 0};
  Flags flags;
  if (const auto text = input.line(); !text.empty()) flags.accelerator = text;
  if (const auto text = input.line(); !text.empty()) flags.strategy = text;
  if (const auto text = input.line(); !text.empty()) flags.devices = text;
  if (const auto text = input.line(); !text.empty()) flags.num_nodes = text;
  if (const auto text = input.line(); !text.empty()) flags.precision = text;
  flags.environment = input.line();
  std::vector<Variable> set;
  while (!input.rest.empty()) {
    const std::string_view line = input.line();
    const std::size_t equals = line.find('=');
    if (equals != std::string_view::npos) set.push_back({line.substr(0, equals), line.substr(equals + 1)});
  }
  const Resolution resolution = resolve(flags, {set.data(), set.size()}, host);
  if (resolution.ok()) {
    fuzz::require(resolution.devices.count >= 0 && resolution.num_nodes >= 1);
  } else {
    fuzz::require(!resolution.problems[0].flag.empty());
    fuzz::require(message(resolution.problems).size() > 20);
  }
  return 0;
}
