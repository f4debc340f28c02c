// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fabric/policy/menu.hpp>

/// What is swept. Free of LibTorch, so that the program's main part compiles in a second; an entry that is not among
/// sources.cmake's does not link.
using SweepMenu = fabric::Menu<fabric::Accelerators<fabric::Cpu>, fabric::Strategies<fabric::SingleDevice, fabric::Ddp>,
                               fabric::Precisions<fabric::F32, fabric::F64, fabric::BF16, fabric::BF16Mixed>>;

struct Settings {
  int steps = 200;
  int layers = 4;
  int width = 256;
  int batch_size = 32;  ///< Rows of each process.
  int devices = 2;      ///< Processes of a parallel strategy.
};

struct Result {
  bool reports = true;  ///< False on all ranks but the first.
  int processes = 1;
  double microseconds = 0;  ///< Of a step.
  double loss = 0;          ///< After the last step.
};

/// Trains on `F`, a `Fabric<...>`, and says how fast that went. Each entry of the menu is compiled in its own
/// translation unit, by measure.hpp.
template <class F>
Result measure(const Settings& settings);
