// SPDX-License-Identifier: Apache-2.0
//
// A job for launchers to start. Every rank says who it is; then the job trains, waits, fails or goes on until it is
// asked to stop.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <thread>

#include <CLI/CLI.hpp>
#include <fabric/checkpoint.hpp>
#include <fabric/fabric.hpp>
#include <torch/torch.h>
#include <unistd.h>

namespace {

using namespace fabric;
using Jobs = Menu<Accelerators<Cpu>, Strategies<SingleDevice, Ddp, DdpSpawn, DdpFork, DdpNotebook>, Precisions<F32>>;

struct Arguments {
  Flags flags;
  std::string job = "train";
  int rank = 0;         ///< That does something.
  std::string counter;  ///< A file in which `count` writes how many steps it has saved; the checkpoint is beside it.
  int steps = 20;
  int setup = 0;      ///< Milliseconds for which `count` does something else before its first step.
  bool dies = false;  ///< Rank `rank` ends before it launches, the first time that it is started.
};

void say(const std::string& text) {
  const std::string line = text + "\n";
  (void)!write(STDOUT_FILENO, line.data(), line.size());
}

/// Fits a plane to points that are dealt to the ranks; however many there are, one step sees the same points.
template <class F>
double train(F& fabric, const Arguments& arguments) {
  constexpr int points = 48;
  torch::manual_seed(1);
  const auto x = torch::randn({points, 3});
  const auto y = x.matmul(torch::tensor({{1.0F}, {-2.0F}, {0.5F}})) + 0.25F;
  torch::nn::Linear net(3, 1);
  auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.1));
  const auto mine = torch::arange(fabric.global_rank(), points, fabric.world_size());
  for (int step = 0; step < arguments.steps; ++step) {
    optimizer.zero_grad();
    fabric.backward(torch::mse_loss(model(x.index({mine})), y.index({mine})));
    optimizer.step();
  }
  return (net->weight.sum() + net->bias.sum()).template item<double>();
}

/// Counts steps in a checkpoint, until there are enough or somebody asks to stop.
template <class F>
double count(F& fabric, const Arguments& arguments) {
  int step = 0;
  const std::string checkpoint = arguments.counter + ".pt";
  if (fabric.broadcast(static_cast<int>(std::filesystem::exists(checkpoint))) != 0) {
    fabric.load(checkpoint, {{"step", step}});
  }
  fabric.print("begins at step ", step);
  std::this_thread::sleep_for(std::chrono::milliseconds(arguments.setup));
  const auto save = [&] {
    fabric.save(checkpoint, {{"step", step}});
    if (fabric.is_global_zero()) std::ofstream(arguments.counter) << step;
  };
  while (step < arguments.steps) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    fabric.barrier();
    ++step;
    if (step % 10 == 0) save();
    if (fabric.should_stop()) {
      save();
      say("rank " + std::to_string(fabric.global_rank()) + " stops after step " + std::to_string(step));
      std::exit(preempted_exit_code);
    }
  }
  save();
  return step;
}

/// Ends a process that torchrun has started as that rank, unless it is a second attempt.
void die_once(const Arguments& arguments) {
  const char* rank = std::getenv("RANK");
  const char* attempt = std::getenv("TORCHELASTIC_RESTART_COUNT");
  if (rank == nullptr || attempt == nullptr || std::stoi(rank) != arguments.rank || std::stoi(attempt) != 0) return;
  say("rank " + std::string(rank) + " dies before it launches");
  std::exit(3);
}

template <class F>
double run(F& fabric, const Arguments& arguments) {
  at::set_num_threads(1);
  say("rank " + std::to_string(fabric.global_rank()) + " is process " + std::to_string(getpid()) +
      " local=" + std::to_string(fabric.local_rank()) + " node=" + std::to_string(fabric.node_rank()) +
      " size=" + std::to_string(fabric.world_size()));
  fabric.barrier();
  const bool chosen = fabric.global_rank() == arguments.rank;
  if (arguments.job == "train") return train(fabric, arguments);
  if (arguments.job == "count") return count(fabric, arguments);
  say("rank " + std::to_string(fabric.global_rank()) + " is ready");
  if (arguments.job == "throw" && chosen) throw std::runtime_error("no more paper");
  for (;;) fabric.barrier();  // "wait", and "throw" on the others
}

}  // namespace

int main(int argc, char** argv) try {
  Arguments arguments;
  CLI::App app("A job for launchers to start");
  add_flags(app, arguments.flags);
  app.add_option("--job", arguments.job)->check(CLI::IsMember({"train", "wait", "throw", "count"}));
  app.add_option("--rank", arguments.rank);
  app.add_option("--counter", arguments.counter);
  app.add_option("--steps", arguments.steps);
  app.add_option("--setup", arguments.setup);
  app.add_flag("--dies", arguments.dies);
  CLI11_PARSE(app, argc, argv);
  if (arguments.job == "count") (void)stop_was_requested();  // from here on, nobody is surprised by a signal
  if (arguments.dies) die_once(arguments);
  if (std::getenv("TORCHELASTIC_RUN_ID") != nullptr) {
    // Two Fabrics, one after the other, in each attempt.
    dispatch<Jobs>(arguments.flags, [](auto& fabric) {
      fabric.launch();
      fabric.barrier();
    });
  }
  dispatch<Jobs>(arguments.flags, [&](auto& fabric) {
    const double result = fabric.launch([&](auto& on) { return run(on, arguments); });
    if (fabric.is_global_zero()) std::printf("result=%.6f\n", result);
  });
  return 0;
} catch (const std::exception& error) {
  std::cerr << "launch_job: " << error.what() << '\n';
  return 1;
}
