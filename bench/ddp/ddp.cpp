// SPDX-License-Identifier: Apache-2.0
//
// Ddp on two processes over gloo, beside hand-written loops that all-reduce after backward, and beside Python's DDP if
// tools/install-python has made its environment. In turns, since what else the machine does changes with time.
//   bench_ddp OUT.json [--quick]

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <fabric/fabric.hpp>
#include <fmt/format.h>
#include <torch/torch.h>

#include "loops.hpp"
#include "support/program.hpp"
#include "support/report.hpp"

namespace {

using namespace bench;
using Fabric = fabric::Fabric<fabric::Cpu, fabric::Ddp, fabric::F32>;

Loop with_fabric(Fabric& fabric, const Size& size) {
  torch::manual_seed(0);
  torch::nn::Sequential net = make_mlp(size);
  torch::manual_seed(1 + fabric.global_rank());
  const Batch batch = make_batch(size);
  auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), learning_rate));
  return [&fabric, model = model, batch, optimizer = optimizer](int steps) mutable {
    at::Tensor loss;
    for (int step = 0; step < steps; ++step) {
      optimizer.zero_grad();
      loss = torch::mse_loss(model(batch.inputs), batch.targets);
      fabric.backward(loss);
      optimizer.step();
    }
    return loss.item<double>();
  };
}

/// Python on the first rank, null where there is none.
std::unique_ptr<Program> start_python() {
  auto python = std::make_unique<Program>(
      std::vector<std::string>{FABRIC_SOURCE_DIR "/tools/run-python", FABRIC_SOURCE_DIR "/bench/ddp/ddp.py"});
  try {
    std::stod(python->ask("1 1 1"));
    return python;
  } catch (const std::exception&) {
    fmt::print("without Python's DDP: tools/install-python makes its environment\n");
    return nullptr;
  }
}

struct Contestant {
  std::string name;
  Loop loop;
  Samples microseconds{};
};

/// Runs all of them in turns, ours first; on the first rank with Python, adds their rows.
void compare(Fabric& fabric, const Size& size, bool quick, Program* python, Report& report) {
  Contestant all[] = {{"Fabric", with_fabric(fabric, size)},
                      {"all-reduce of each gradient", by_hand_each(size, fabric.world().group)},
                      {"all-reduce of a flat gradient", by_hand_flat(size, fabric.world().group)}};
  constexpr int warm_up = 20;
  const double loss = all[0].loop(warm_up);
  for (Contestant& contestant : all) {
    if (&contestant != &all[0] && std::abs(contestant.loop(warm_up) - loss) > 1e-5 * loss) {
      throw std::runtime_error("Fabric and the " + contestant.name + " differ in their losses");
    }
  }
  Samples python_microseconds;
  const int rounds = quick ? 3 : 31;
  const int steps = quick ? 3 : size.width < 100 ? 100 : 5;
  for (int round = 0; round < rounds; ++round) {
    for (std::size_t turn = 0; turn < std::size(all); ++turn) {
      Contestant& contestant = all[(turn + static_cast<std::size_t>(round)) % std::size(all)];
      fabric.barrier();
      const double start = now();
      contestant.loop(steps);
      contestant.microseconds.add((now() - start) / steps * 1e6);
    }
    if (python != nullptr) {
      const std::string answer = python->ask(fmt::format("{} {} {}", size.layers, size.width, steps));
      if (round > 0) python_microseconds.add(std::stod(answer));  // the first one warms up
    }
  }
  if (!fabric.is_global_zero()) return;
  for (const Contestant& contestant : all) {
    if (&contestant == &all[0]) continue;
    report.add({size.name(), "us/step", all[0].microseconds, contestant.microseconds, contestant.name});
  }
  if (python != nullptr) {
    report.add({size.name(), "us/step", all[0].microseconds, python_microseconds, "Python DistributedDataParallel"});
  }
}

}  // namespace

int main(int argc, char** argv) try {
  const Arguments arguments = parse(argc, argv);
  Fabric fabric({.devices = 2});
  fabric.launch();
  at::set_num_threads(1);
  const auto python = fabric.is_global_zero() && !arguments.quick ? start_python() : nullptr;
  Report report;
  for (const Size& size : sizes) compare(fabric, size, arguments.quick, python.get(), report);
  if (fabric.is_global_zero()) report.write(arguments.json);
  fabric.barrier();
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "ddp: {}\n", error.what());
  return 1;
}
