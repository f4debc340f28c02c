// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <utility>

#include <fabric/dispatch.hpp>
#include <fabric/sharding.hpp>
#include <torch/torch.h>

#include "task.hpp"
#include "transformer.hpp"

namespace bench {

inline constexpr double learning_rate = 1e-4;

/// Calls `run(fabric)` on all ranks, one thread each, with the entry of `Menu` that the task's strategy means.
template <class Menu, class Run>
void run_on(const Task& task, Run&& run) {
  fabric::Flags flags;
  flags.accelerator = "cpu";
  flags.strategy = std::string_view(task.strategy);
  flags.devices = std::string_view(task.devices);
  flags.precision = task.measure == "time" ? "32-true" : "bf16-mixed";
  const fabric::Selection selection = fabric::resolve_for<Menu>(flags);
  fabric::visit_selected<Menu>(selection, [&](auto entry) {
    using F = typename decltype(entry)::type;
    typename F::Options options;
    if constexpr (requires { options.strategy.units; })
      options.strategy.units = decltype(options.strategy.units)::template by_type<BlockImpl>();
    if constexpr (requires { options.strategy.nvme_path; })
      options.strategy.nvme_path = std::filesystem::temp_directory_path();
    F fabric(selection, std::move(options));
    fabric.launch();
    at::set_num_threads(1);
    run(fabric);
    fabric.barrier();
  });
}

}  // namespace bench
