// SPDX-License-Identifier: Apache-2.0
//
// The processes whose steps are timed.

#include <cstdint>
#include <iostream>
#include <string>
#include <utility>

#include <fabric/dispatch.hpp>
#include <fmt/format.h>

#include "run_on.hpp"
#include "support/program.hpp"
#include "task.hpp"
#include "transformer.hpp"

namespace bench {
namespace {

using Menu =
    fabric::Menu<fabric::Accelerators<fabric::Cpu>,
                 fabric::Strategies<fabric::Ddp, fabric::DeepSpeed<1>, fabric::DeepSpeed<2>, fabric::DeepSpeed<3>>,
                 fabric::Precisions<fabric::F32>>;

/// The number on the first rank's next line, on all ranks; 0 at the end.
template <class F>
std::int64_t next_order(const F& fabric) {
  std::string line;
  if (fabric.is_global_zero()) std::getline(std::cin, line);
  return fabric.broadcast(line.empty() ? std::int64_t{0} : std::stoll(line));
}

}  // namespace

void measure_time(const Task& task) {
  const Shape shape = shape_of(task.model);
  run_on<Menu>(task, [&](auto& fabric) {
    torch::manual_seed(0);
    Transformer net(shape);
    torch::manual_seed(1 + static_cast<std::uint64_t>(fabric.global_rank()));
    const Text text = make_text(shape);
    auto [model, optimizer] =
        fabric.setup(net, fabric::optim::AdamW(net->parameters(), fabric::optim::AdamWOptions(learning_rate)));
    while (const std::int64_t steps = next_order(fabric)) {
      fabric.barrier();
      const double start = now();
      at::Tensor loss;
      for (std::int64_t step = 0; step < steps; ++step) {
        optimizer.zero_grad();
        loss = loss_of(model(text.inputs), text.targets);
        fabric.backward(loss);
        optimizer.step();
      }
      const double last = loss.item<double>();
      fabric.print((now() - start) / static_cast<double>(steps) * 1e6, " ", last);
    }
  });
}

}  // namespace bench
