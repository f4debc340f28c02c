// SPDX-License-Identifier: Apache-2.0
// labels: distributed sharding
// ranks: 4
//
// How sharded training ends when a rank is killed in the middle of a step. With `job STAGE` as arguments, this program
// is such a training.
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <string>
#include <thread>

#include <torch/torch.h>

#include "fabric/sharding.hpp"
#if !__has_include(<catch2/catch_all.hpp>)
#define CATCH_CONFIG_RUNNER
#endif
#include "support/catch.hpp"
#include "support/job.hpp"
#include "support/process.hpp"

namespace {

using namespace fabric;
using namespace fabric::tests;

constexpr int ranks = 4;

template <int stage>
int train_for_ever() {
  Fabric<Cpu, DeepSpeed<stage>, F32> fabric({.devices = ranks, .strategy = {.units = Units::by_size(70'000)}});
  fabric.launch();
  at::set_num_threads(1);
  say_who(fabric.global_rank());
  torch::nn::Sequential net(torch::nn::Linear(256, 256), torch::nn::Tanh(), torch::nn::Linear(256, 256),
                            torch::nn::Tanh(), torch::nn::Linear(256, 256));
  auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), 1e-3));
  for (int step = 0;; ++step) {
    optimizer.zero_grad();
    fabric.backward(model(torch::randn({16, 256})).pow(2).mean());
    optimizer.step();
    if (step == 3) say("rank " + std::to_string(fabric.global_rank()) + " trains");
  }
}

}  // namespace

TEST_CASE("[issue-8.accept] a rank that is killed in the middle of a step takes the others along, named") {
  for (const std::string stage : {"2", "3"}) {
    for (const int rank : {0, 2}) {
      INFO("stage " << stage << ", rank " << rank);
      Process process({"/proc/self/exe", "job", stage});
      for (int r = 0; r < ranks; ++r) REQUIRE(process.wait_for("rank " + std::to_string(r) + " trains"));
      std::this_thread::sleep_for(std::chrono::milliseconds(37));  // somewhere in a step
      const auto start = std::chrono::steady_clock::now();
      const pid_t victim = process_of(process.output(), rank);
      REQUIRE(victim > 1);
      kill(victim, SIGKILL);
      CHECK(process.wait(30) != 0);
      INFO(process.output());
      CHECK(seconds_since(start) < 10);
      // Rank 0 is the parent of the others, so that its death is told by nobody but them.
      if (rank != 0) {
        CHECK(count(process.output(), "fabric: rank 2 of 4 (process ") == 1);
        CHECK_THAT(process.output(), ContainsSubstring("was killed by signal 9 (Killed)"));
      }
      for (int r = 0; r < ranks; ++r) CHECK(ends(process_of(process.output(), r), 10));
    }
  }
}

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "job") {
    return std::string(argv[2]) == "2" ? train_for_ever<2>() : train_for_ever<3>();
  }
  return Catch::Session().run(argc, argv);
}
