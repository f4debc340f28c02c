// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

#include "fabric/config.hpp"
#include "oracle/class_names.hpp"

// What the generated static_asserts compare.

namespace oracle {

/// The parts of a row's outcome that a static_assert checks. Texts are the reference's; -1 stands for a number that the
/// row does not know.
struct Outcome {
  fabric::Code code = fabric::Code::none;
  std::string_view stage{};
  std::string_view accelerator{}, strategy{}, strategy_flag{}, accelerator_flag{}, launcher{}, start_method{};
  std::string_view precision{}, precision_value{}, environment{};
  bool external_launch = false;
  int devices = 0, num_nodes = 1, world_size = 1, global_rank = 0, local_rank = 0;
  fabric::Code settings = fabric::Code::none;
};

constexpr bool same(const fabric::Rank& rank, int value) { return rank.known() ? rank.value == value : value == -1; }

/// Is the resolution what the row says?
constexpr bool same(const fabric::Resolution& r, const Outcome& o) {
  if (r.code() != o.code) return false;
  if (!r.ok()) return name_of(r.stage) == o.stage;
  return class_of(r.accelerator.name) == o.accelerator && class_of(r.strategy.name) == o.strategy &&
         r.strategy_flag == o.strategy_flag && r.accelerator_flag == o.accelerator_flag &&
         launcher_class(r) == o.launcher && start_method_name(r) == o.start_method &&
         precision_class(r) == o.precision && precision_value(r) == o.precision_value &&
         environment_class(r) == o.environment && r.external_launch == o.external_launch &&
         r.devices.count == o.devices && r.num_nodes == o.num_nodes && same(r.world_size, o.world_size) &&
         same(r.global_rank, o.global_rank) && same(r.local_rank, o.local_rank) && r.settings.code == o.settings;
}

}  // namespace oracle
