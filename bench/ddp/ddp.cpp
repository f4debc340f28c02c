// SPDX-License-Identifier: Apache-2.0
//
// Ddp on two processes over gloo, beside hand-written loops that all-reduce after backward, and beside Python's DDP if
// tools/install-python has made its environment. In turns, since what else the machine does changes with time.
//   bench_ddp OUT.json [--quick]
//   bench_ddp LOOP SIZE STEPS     only runs a loop; valgrind counts what the first rank executes in this

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fabric/fabric.hpp>
#include <fmt/format.h>
#include <torch/torch.h>
#include <unistd.h>

#include "loops.hpp"
#include "support/instructions.hpp"
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

constexpr const char* ours = "Fabric";
constexpr const char* each = "all-reduce of each gradient";
constexpr const char* flat = "all-reduce of a flat gradient";

Loop make_loop(std::string_view name, Fabric& fabric, const Size& size) {
  if (name == ours) return with_fabric(fabric, size);
  if (name == each) return by_hand_each(size, fabric.world().group);
  if (name == flat) return by_hand_flat(size, fabric.world().group);
  throw std::invalid_argument(fmt::format("there is no loop '{}', but '{}', '{}' and '{}'", name, ours, each, flat));
}

struct Contestant {
  std::string name;
  Loop loop;
  Samples microseconds{};
};

/// Runs all of them in turns, ours first; on the first rank with Python, adds their rows.
void compare(Fabric& fabric, const Size& size, bool quick, Program* python, Report& report) {
  Contestant all[] = {{ours, make_loop(ours, fabric, size)},
                      {each, make_loop(each, fabric, size)},
                      {flat, make_loop(flat, fabric, size)}};
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

/// What the first of two ranks executes in that many steps, with the threads of gloo that it waits for.
double instructions_of_first_rank(const std::string& loop, const Size& size, int steps) {
  const int listener = fabric::detail::listen_on("127.0.0.1", 0);
  const int port = fabric::detail::port_of(listener);
  close(listener);  // the first rank takes it
  const auto variables = [port](int rank) {
    return std::vector<std::string>{"MASTER_ADDR=127.0.0.1", fmt::format("MASTER_PORT={}", port), "WORLD_SIZE=2",
                                    fmt::format("LOCAL_RANK={}", rank)};
  };
  const std::vector<std::string> arguments{loop, size.name(), std::to_string(steps)};
  Program second(this_program(variables(1), {}, arguments));
  const double count = instructions(variables(0), arguments);
  second.wait();
  return count;
}

/// Before launch(), whose variables a program that starts another job must not pass on.
void count_instructions(Report& report) {
  require_valgrind();
  for (const Size& size : sizes) {
    const auto of = [&size](const char* loop) {
      return per_step([&](int steps) { return instructions_of_first_rank(loop, size, steps); },
                      size.width < 100 ? 100 : 10);
    };
    const Samples of_ours{of(ours)};
    for (const char* other : {each, flat}) report.add({size.name(), "instructions/step", of_ours, {of(other)}, other});
  }
}

}  // namespace

int main(int argc, char** argv) try {
  const bool runs_one = argc == 4;
  const Arguments arguments = runs_one ? Arguments{} : parse(argc, argv);
  Report report;
  Fabric fabric({.devices = 2});
  if (fabric.is_global_zero() && !runs_one && !arguments.quick) count_instructions(report);
  fabric.launch();
  at::set_num_threads(1);
  if (runs_one) {
    make_loop(argv[1], fabric, size_named(argv[2]))(std::atoi(argv[3]));
    return 0;
  }
  const auto python = fabric.is_global_zero() && !arguments.quick ? start_python() : nullptr;
  for (const Size& size : sizes) compare(fabric, size, arguments.quick, python.get(), report);
  if (fabric.is_global_zero()) report.write(arguments.json);
  fabric.barrier();
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "ddp: {}\n", error.what());
  return 1;
}
