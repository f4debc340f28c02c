// SPDX-License-Identifier: Apache-2.0
// labels: distributed launch
// timeout: 240
// ranks: 4
//
// How a job of four processes ends when one of them fails, hangs, gets out of step or is asked to stop. Run with `job
// NAME RANK` as arguments, this program is such a job, in which that rank does something.
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <torch/torch.h>

#include "fabric/fabric.hpp"
#if !__has_include(<catch2/catch_all.hpp>)
#define CATCH_CONFIG_RUNNER
#endif
#include "support/catch.hpp"
#include "support/job.hpp"
#include "support/process.hpp"

namespace {

using namespace fabric;
using namespace fabric::tests;
using OnCpu = Fabric<Cpu, Ddp, F32>;

constexpr int ranks = 4;
int chosen = 0;  // the rank that does something

/// A fabric on four ranks that have said their process ids.
OnCpu& launched(DdpOptions options = {}) {
  static OnCpu fabric({.devices = ranks, .strategy = std::move(options)});
  fabric.launch();
  at::set_num_threads(1);
  say_who(fabric.global_rank());
  fabric.barrier();
  return fabric;
}

[[noreturn]] void collect_for_ever(OnCpu& fabric) {
  for (;;) fabric.barrier();
}
[[noreturn]] void sleep_for_ever() {
  for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
}

void train_once(OnCpu& fabric, bool backward) {
  auto [model, optimizer] = [&] {
    torch::nn::Linear net(3, 2);
    return fabric.setup(net, torch::optim::SGD(net->parameters(), 0.1));
  }();
  auto loss = model(torch::ones({1, 3})).sum();
  if (backward) fabric.backward(loss);
}

const std::map<std::string, std::function<int()>> jobs{
    {"throw_in_collective",
     [] {
       auto& fabric = launched();
       if (fabric.global_rank() == chosen) throw std::runtime_error("the disk is full");
       collect_for_ever(fabric);
       return 0;
     }},
    {"throw_while_others_sleep",
     [] {
       auto& fabric = launched();
       if (fabric.global_rank() == chosen) throw std::runtime_error("the disk is full");
       sleep_for_ever();
       return 0;
     }},
    {"throw_through_launch",
     [] {
       try {
         OnCpu fabric({.devices = ranks});
         fabric.launch([](OnCpu& on) {
           say_who(on.global_rank());
           on.barrier();
           if (on.global_rank() == chosen) throw std::runtime_error("the disk is full");
           collect_for_ever(on);
         });
       } catch (const std::exception& error) {
         say(std::string("caught: ") + error.what());
         return 7;
       }
       return 0;
     }},
    {"collect",
     [] {
       auto& fabric = launched();
       say("ready");
       collect_for_ever(fabric);
       return 0;
     }},
    {"sleep",
     [] {
       launched();
       say("ready");
       sleep_for_ever();
       return 0;
     }},
    {"stop_answering",
     [] {
       auto& fabric = launched({.timeout = std::chrono::milliseconds(1500)});
       if (fabric.global_rank() == chosen) sleep_for_ever();
       (void)fabric.all_reduce(torch::ones({2, 3}));
       return 0;
     }},
    {"stop_answering_in_backward",
     [] {
       auto& fabric = launched({.timeout = std::chrono::milliseconds(1500)});
       train_once(fabric, fabric.global_rank() != chosen);
       if (fabric.global_rank() == chosen) sleep_for_ever();
       return 0;
     }},
    {"other_collective",
     [] {
       auto& fabric = launched({.detect_desync = true});
       if (fabric.global_rank() == chosen) {
         (void)fabric.broadcast(torch::ones({2, 3}));
       } else {
         (void)fabric.all_reduce(torch::ones({2, 3}));
       }
       return 0;
     }},
    {"other_shape",
     [] {
       setenv("FABRIC_DETECT_DESYNC", "1", 1);
       auto& fabric = launched();
       (void)fabric.all_reduce(torch::ones({2, fabric.global_rank() == chosen ? 4 : 3}));
       return 0;
     }},
    {"in_step",
     [] {
       auto& fabric = launched({.detect_desync = true});
       train_once(fabric, true);
       const auto sum = fabric.all_reduce(torch::ones({2}), ReduceOp::sum).sum().item<int>();
       fabric.print("sum=", sum);
       return 0;
     }},
    {"other_parameters",
     [] {
       auto& fabric = launched();
       torch::nn::Sequential net(torch::nn::Linear(2, 2));
       if (fabric.global_rank() == chosen) net->push_back(torch::nn::Linear(2, 1));
       auto model = fabric.setup(net);
       return 0;
     }},
    {"other_seed",
     [] {
       auto& fabric = launched();
       const std::uint64_t seed = fabric.global_rank() == chosen ? 6 : 5;
       (void)fabric.setup_dataloader(torch::data::datasets::TensorDataset(torch::ones({8})),
                                     {.shuffle = true, .seed = seed});
       return 0;
     }},
    {"until_stopped",
     [] {
       auto& fabric = launched();
       int step = 0;
       std::mt19937 random(static_cast<unsigned>(fabric.global_rank()));
       do {
         ++step;
         // Ranks differ in speed, and now and then nothing holds them together for a while.
         std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
         if (step % 5 == 0) fabric.barrier();
         if (step == 10 && fabric.is_global_zero()) say("ready");
       } while (!fabric.should_stop());
       say("rank " + std::to_string(fabric.global_rank()) + " stops after step " + std::to_string(step));
       return preempted_exit_code;
     }},
    {"leave_at_different_times",
     [] {
       OnCpu fabric({.devices = ranks});
       fabric.launch();
       for (int i = 0; i < 3; ++i) (void)fabric.all_reduce(torch::ones({1 << 16}));
       std::this_thread::sleep_for(std::chrono::milliseconds(fabric.global_rank() * 50));
       return 0;
     }},
    {"exit_amid_everything",
     []() -> int {
       auto& fabric = launched();
       auto model = fabric.setup(torch::nn::Linear(3, 2));
       std::exit(0);
     }},
};

// ---- What the test cases need ----

Process job(const std::string& name, int rank = 0) {
  return Process({"/proc/self/exe", "job", name, std::to_string(rank)});
}

void check_that_nobody_is_left(const std::string& output) {
  for (int rank = 0; rank < ranks; ++rank) {
    const pid_t process = process_of(output, rank);
    REQUIRE(process > 0);
    CHECK(ends(process));
  }
}

/// Sends a signal to that rank, which has said who it is.
void signal_rank(const Process& process, int rank, int signal) {
  const pid_t id = process_of(process.output(), rank);
  REQUIRE(id > 1);
  kill(id, signal);
}

/// Runs a job in which that rank fails by itself; returns its output.
std::string fail(const std::string& name, int rank, double within, int code) {
  INFO(name << " on rank " << rank);
  auto process = job(name, rank);
  for (int r = 0; r < ranks; ++r) REQUIRE(process.wait_for("rank " + std::to_string(r) + " is process"));
  const auto start = std::chrono::steady_clock::now();
  const int ended = process.wait(60);
  INFO(process.output());
  CHECK(ended == code);
  CHECK(seconds_since(start) < within);
  check_that_nobody_is_left(process.output());
  return process.output();
}

}  // namespace

TEST_CASE("[issue-6.4] an exception on a rank ends all within 5 seconds, and the reason is printed once") {
  for (const char* name : {"throw_in_collective", "throw_while_others_sleep"}) {
    for (const int rank : {0, 2}) {
      const std::string output = fail(name, rank, 5, 128 + SIGABRT);
      INFO(output);
      CHECK(count(output, "the disk is full") == 1);
      CHECK_THAT(output, ContainsSubstring("fabric: rank " + std::to_string(rank) + " of 4 (process " +
                                           std::to_string(process_of(output, rank))));
    }
  }
}

TEST_CASE("[issue-6.4] an exception that leaves launch(function) ends the others, and can be caught") {
  const std::string output = fail("throw_through_launch", 2, 5, 1);
  INFO(output);
  CHECK(count(output, "caught: the disk is full") == 1);  // on its own rank
  CHECK(count(output, "caught: ") == 1);
  CHECK(count(output, "rank 2 of 4 (process " + std::to_string(process_of(output, 2)) + " on ") == 1);
}

TEST_CASE("[issue-6.4] a rank that is killed takes the others along within 10 seconds, named") {
  for (const char* name : {"collect", "sleep"}) {
    for (const int rank : {1, 3}) {
      INFO(name << " on rank " << rank);
      auto process = job(name);
      for (int r = 0; r < ranks; ++r) REQUIRE(process.wait_for("rank " + std::to_string(r) + " is process"));
      const auto start = std::chrono::steady_clock::now();
      signal_rank(process, rank, SIGKILL);
      CHECK(process.wait(30) == 128 + SIGKILL);
      INFO(process.output());
      CHECK(seconds_since(start) < 10);
      CHECK(count(process.output(), "rank " + std::to_string(rank) + " of 4 (process ") == 1);
      CHECK_THAT(process.output(), ContainsSubstring("was killed by signal 9 (Killed)"));
      CHECK_THAT(process.output(), !ContainsSubstring("Connection"));  // which is only what others saw of it
      check_that_nobody_is_left(process.output());
    }
  }
}

TEST_CASE("[issue-6.4] a collective that takes too long names itself, its number and its rank") {
  const std::string output = fail("stop_answering", 1, 12, 128 + SIGABRT);
  INFO(output);
  CHECK_THAT(output, ContainsSubstring("all_reduce failed on rank ") &&
                         ContainsSubstring(" of 4, as collective number 2 of its group, with Float [2, 3]"));
  const std::string backward = fail("stop_answering_in_backward", 1, 12, 128 + SIGABRT);
  INFO(backward);
  CHECK_THAT(backward, ContainsSubstring("failed on rank ") && ContainsSubstring("collective number "));
}

TEST_CASE("[issue-6.5] modules that differ are found at setup, with both sides, on all ranks") {
  const std::string output = fail("other_parameters", 2, 5, 128 + SIGABRT);
  INFO(output);
  CHECK_THAT(output, ContainsSubstring("rank 0 has nothing more, rank 2 has '1.weight: Float [1, 2], trained'"));
}

TEST_CASE("[issue-6.5] seeds that differ are found when data are dealt") {
  const std::string output = fail("other_seed", 3, 5, 128 + SIGABRT);
  INFO(output);
  CHECK_THAT(output, ContainsSubstring("seed 5', rank 3 has ") && ContainsSubstring("seed 6'"));
}

TEST_CASE("[issue-6.5] detect_desync finds collectives and shapes that differ, with both sides") {
  const std::string collective = fail("other_collective", 2, 10, 128 + SIGABRT);
  INFO(collective);
  CHECK_THAT(collective, ContainsSubstring("ALLREDUCE") && ContainsSubstring("BROADCAST"));
  const std::string shape = fail("other_shape", 2, 10, 128 + SIGABRT);
  INFO(shape);
  CHECK_THAT(shape, ContainsSubstring("2, 3") && ContainsSubstring("2, 4"));
}

TEST_CASE("[issue-6.5] ranks in step pass detect_desync") {
  auto process = job("in_step");
  CHECK(process.wait() == 0);
  CHECK_THAT(process.output(), ContainsSubstring("sum=8"));
}

TEST_CASE("[issue-6.6] a signal to any rank stops all after the same step, with the documented exit code") {
  for (const auto& [rank, signal] : {std::pair(0, SIGTERM), std::pair(3, SIGUSR1)}) {
    {
      auto process = job("until_stopped");
      for (int r = 0; r < ranks; ++r) REQUIRE(process.wait_for("rank " + std::to_string(r) + " is process"));
      REQUIRE(process.wait_for("ready"));
      signal_rank(process, rank, signal);
      CHECK(process.wait(30) == 75);
      INFO(process.output());
      const auto at = process.output().find("stops after step ");
      REQUIRE(at != std::string::npos);
      const std::string step = process.output().substr(at, process.output().find('\n', at) - at);
      CHECK(count(process.output(), step + "\n") == ranks);
    }
  }
}

TEST_CASE(
    "[issue-6.7] ranks that leave one after the other do not disturb each other, and nothing is printed at exit") {
  for (const char* name : {"leave_at_different_times", "exit_amid_everything"}) {
    for (int i = 0; i < 3; ++i) {
      auto process = job(name);
      CHECK(process.wait() == 0);
      INFO(process.output());
      std::string printed = process.output();
      const auto slurm = printed.find("fabric: warning: Slurm is here");  // where it is, it is
      if (slurm != std::string::npos) printed.erase(slurm, printed.find('\n', slurm) + 1 - slurm);
      for (int rank = 0; rank < ranks && name[0] == 'e'; ++rank) {
        CHECK(count(printed, "rank " + std::to_string(rank) + " is process ") == 1);
      }
      CHECK_THAT(printed,
                 !ContainsSubstring("arn") && !ContainsSubstring("onnection") && !ContainsSubstring("terminate"));
    }
  }
}

int main(int argc, char** argv) {
  if (argc == 4 && std::string(argv[1]) == "job") {
    chosen = std::atoi(argv[3]);
    return jobs.at(argv[2])();
  }
  return Catch::Session().run(argc, argv);
}
