// SPDX-License-Identifier: Apache-2.0
// labels: distributed launch
// timeout: 180
// ranks: 3
//
// Processes that are spawned or forked for a function. Run with `job NAME` as arguments, this program is such a job.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
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
using Spawned = Fabric<Cpu, DdpSpawn, F32>;
using Forked = Fabric<Cpu, DdpFork, F32>;

template <class F>
int results() {
  say("the program begins in process " + std::to_string(getpid()));
  F fabric({.devices = 2});
  using All = std::tuple<double, std::string, at::Tensor, std::vector<std::int64_t>, std::optional<bool>>;
  const int rows = 3;
  auto [number, text, tensor, list, maybe] = fabric.launch(
      [](F& on, int n) -> All {
        say_who(on.global_rank());
        const auto ranks = on.all_gather(torch::tensor({on.global_rank() + 1}));
        return {0.5 + on.global_rank(),
                "text\n of rank " + std::to_string(on.global_rank()),
                ranks.expand({2, n}).to(at::kBFloat16),
                {on.world_size(), 7},
                std::nullopt};
      },
      rows);
  F again({.devices = 2});
  const std::string second =
      again.launch([&text = text](F& on) { return text + " and " + std::to_string(on.all_reduce(1, ReduceOp::sum)); });
  F third({.devices = 2});
  third.launch([](F& on) { on.barrier(); });
  std::printf("number=%g text=%s dtype=%s sum=%g list=%d,%d maybe=%d second=%s parent=%d\n", number, text.c_str(),
              at::toString(tensor.scalar_type()), tensor.sum().to(at::kDouble).template item<double>(),
              static_cast<int>(list[0]), static_cast<int>(list[1]), static_cast<int>(maybe.has_value()), second.c_str(),
              static_cast<int>(getpid()));
  return 0;
}

template <class F>
int reason() {
  F fabric({.devices = 3});
  try {
    fabric.launch([](F& on) {
      say_who(on.global_rank());
      on.barrier();
      if (on.global_rank() == 1) throw std::runtime_error("no such file");
      for (;;) on.barrier();
    });
  } catch (const Error& error) {
    say(std::string("caught: ") + error.what());
  }
  return 0;
}

/// Learns a little, with operators large enough for several threads.
template <class F>
int train_in_parallel() {
  at::set_num_threads(2);
  auto big = torch::rand({1 << 20}).exp().sum() + torch::rand({600, 600}).mm(torch::rand({600, 600})).sum();
  auto leaf = torch::ones({300, 300}).requires_grad_();
  leaf.mm(leaf).sum().backward();
  F fabric({.devices = 2});
  const double result = fabric.launch([&](F& on) {
    torch::nn::Linear net(600, 600);
    auto [model, optimizer] = on.setup(net, torch::optim::SGD(net->parameters(), 0.1));
    for (int step = 0; step < 2; ++step) {
      optimizer.zero_grad();
      on.backward(model(torch::rand({600, 600})).sum());
      optimizer.step();
    }
    return (torch::rand({1 << 20}).exp().sum() * 0).template item<double>();
  });
  say("learnt " + std::to_string(result));
  return big.item<float>() > 0 ? 0 : 1;
}

const std::map<std::string, std::function<int()>> jobs{
    {"spawn", [] { return results<Spawned>(); }},
    {"fork", [] { return results<Forked>(); }},
    {"spawn_reason", [] { return reason<Spawned>(); }},
    {"fork_reason", [] { return reason<Forked>(); }},
    {"fork_after_parallel", [] { return train_in_parallel<Forked>(); }},
    {"fork_with_cuda",
     [] {
       Forked fabric({.devices = 2});
       try {
         fabric.launch([](Forked&) { say("has forked"); });
       } catch (const Error& error) {
         say(error.what());
       }
       return 0;
     }},
    {"script",
     [] {
       Spawned fabric({.devices = 2});
       fabric.launch();
       say_who(fabric.global_rank());
       fabric.barrier();
       return fabric.global_rank() == 1 && variable("FAIL") != "-" ? 6 : 0;
     }},
    {"threads",
     [] {
       if (variable("THREADS") != "-") at::set_num_threads(std::stoi(variable("THREADS")));
       Fabric<Cpu, Ddp, F32> fabric({.devices = 2});
       fabric.launch();
       say("rank " + std::to_string(fabric.global_rank()) + " threads=" + std::to_string(at::get_num_threads()) +
           " OMP_NUM_THREADS=" + variable("OMP_NUM_THREADS"));
       return 0;
     }},
    {"unused",
     [] {
       Fabric<Cpu, DdpForkFindUnusedParameters, F32> fabric({.devices = 2});
       return fabric.launch([](auto& on) {
         struct Net : torch::nn::Module {
           torch::nn::Linear used{register_module("used", torch::nn::Linear(2, 1))};
           torch::nn::Linear unused{register_module("unused", torch::nn::Linear(2, 1))};
           at::Tensor forward(const at::Tensor& x) { return used(x); }
         };
         auto net = std::make_shared<Net>();
         auto [model, optimizer] = on.setup(net, torch::optim::SGD(net->parameters(), 0.1));
         for (int step = 0; step < 2; ++step) {
           optimizer.zero_grad();
           on.backward(model(torch::ones({1, 2})).sum());
           optimizer.step();
         }
         return 0;
       });
     }},
};

Process job(const std::string& name, const std::vector<Process::Variable>& variables = {}) {
  return Process({"/proc/self/exe", "job", name}, variables);
}

}  // namespace

TEST_CASE("[issue-6.1] launch(function) runs it in processes of its own and brings back rank 0's result") {
  for (const char* name : {"spawn", "fork"}) {
    auto process = job(name);
    CHECK(process.wait() == 0);
    const std::string& output = process.output();
    INFO(output);
    CHECK_THAT(output, ContainsSubstring("number=0.5 text=text\n of rank 0 dtype=BFloat16 sum=9 list=2,7 maybe=0 "
                                         "second=text\n of rank 0 and 2 parent=" +
                                         std::to_string(process.pid())));
    // Three launches of two fresh processes begin the program anew; forks go on where they are.
    CHECK(count(output, "the program begins in process") == (std::string(name) == "spawn" ? 1 + 3 * 2 : 1));
    CHECK(count(output, "number=") == 1);
    CHECK(process_of(output, 0) != process.pid());
  }
}

TEST_CASE("[issue-6.1] what a rank dies of comes out of launch(function), which leaves nobody") {
  for (const char* name : {"spawn_reason", "fork_reason"}) {
    auto process = job(name);
    const auto start = std::chrono::steady_clock::now();
    CHECK(process.wait(60) == 0);
    INFO(process.output());
    CHECK(seconds_since(start) < 30);
    CHECK(count(process.output(), "no such file") == 1);
    CHECK_THAT(process.output(),
               ContainsSubstring("caught: fabric: rank 1 of 3 (process ") && ContainsSubstring("failed: no such file"));
    for (int rank = 0; rank < 3; ++rank) CHECK(ends(process_of(process.output(), rank)));
  }
}

TEST_CASE("[issue-6.1] a fork after parallel operators and a backward is safe") {
  auto process = job("fork_after_parallel", {{"OMP_NUM_THREADS", "2"}});
  CHECK(process.wait(60) == 0);
  CHECK_THAT(process.output(), ContainsSubstring("learnt 0.0"));
}

TEST_CASE("[issue-6.1] a fork after CUDA was initialised is refused, with the reason") {
  // A driver that says so: the real one is not needed to try what the library asks it.
  const std::string folder = std::string("/tmp/fabric-cuda-") + std::to_string(getpid());
  Process make({"sh", "-c",
                "mkdir -p " + folder +
                    " && echo 'int cuDeviceGetCount(int* n) { *n = 1; return 0; }' | cc -shared -fPIC -o " + folder +
                    "/libcuda.so.1 -Wl,-soname,libcuda.so.1 -x c -"});
  REQUIRE(make.wait() == 0);
  auto process = job("fork_with_cuda", {{"LD_PRELOAD", folder + "/libcuda.so.1"}});
  CHECK(process.wait() == 0);
  INFO(process.output());
  CHECK_THAT(process.output(), ContainsSubstring("has initialised CUDA, which does not survive a fork") &&
                                   ContainsSubstring("ddp_spawn") && !ContainsSubstring("has forked"));
  auto without = job("fork_with_cuda");
  CHECK(without.wait() == 0);
  CHECK(count(without.output(), "has forked") == 2);
  std::remove((folder + "/libcuda.so.1").c_str());
  std::remove(folder.c_str());
}

TEST_CASE("[issue-6.1] launch() of a spawning strategy turns the process into the others' supervisor") {
  auto process = job("script");
  CHECK(process.wait() == 0);
  CHECK(process_of(process.output(), 0) != process.pid());
  CHECK(process_of(process.output(), 1) != process.pid());
  auto failing = job("script", {{"FAIL", "1"}});
  CHECK(failing.wait() == 6);
  CHECK_THAT(failing.output(), ContainsSubstring("rank 1 of 2") && ContainsSubstring("ended with exit code 6"));
}

TEST_CASE("[issue-6.1] local ranks share the cores, unless the user has said how many threads they use") {
  const int each = std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / 2);
  // The tests' own processes are told to use one thread.
  const auto threads = [](const std::string& setting) {
    return std::make_unique<Process>(std::vector<std::string>{"sh", "-c", setting + "; exec \"$0\" job threads",
                                                              FABRIC_BIN "/distributed_start_methods"});
  };
  const auto process = threads("unset OMP_NUM_THREADS");
  CHECK(process->wait() == 0);
  for (const char* rank : {"0", "1"}) {
    CHECK_THAT(process->output(), ContainsSubstring(std::string("rank ") + rank + " threads=" + std::to_string(each)));
  }
  const auto chosen = threads("export OMP_NUM_THREADS=3");
  CHECK(chosen->wait() == 0);
  CHECK(count(chosen->output(), "OMP_NUM_THREADS=3") == 2);
  CHECK_THAT(chosen->output(), !ContainsSubstring("threads=" + std::to_string(each) + " "));
  // On four cores or more, that is not what each would get.
  const auto fewer = threads("unset OMP_NUM_THREADS; export THREADS=1");
  CHECK(fewer->wait() == 0);
  CHECK(count(fewer->output(), "threads=1 ") == 2);
}

TEST_CASE("[issue-6.1] what the others print is labelled with their rank, or goes to a file for each rank") {
  auto labelled = job("threads");
  CHECK(labelled.wait() == 0);
  CHECK_THAT(labelled.output(), ContainsSubstring("[rank 1] rank 1 threads=1") && !ContainsSubstring("[rank 0]"));
  const std::string folder = std::string("/tmp/fabric-logs-") + std::to_string(getpid());
  auto logged = job("threads", {{"FABRIC_LOG_DIR", folder}});
  CHECK(logged.wait() == 0);
  CHECK_THAT(logged.output(), !ContainsSubstring("threads="));
  for (const std::string rank : {"0", "1"}) {
    const std::string path = folder + "/rank_" + rank + ".log";
    std::ifstream file(path);
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    CHECK_THAT(text, ContainsSubstring("rank " + rank + " threads=1"));
    std::remove(path.c_str());
  }
  std::remove(folder.c_str());
}

TEST_CASE("[issue-6.1] forked ranks can look for unused parameters") {
  auto process = job("unused");
  CHECK(process.wait() == 0);
  INFO(process.output());
}

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "job") return jobs.at(argv[2])();
  return Catch::Session().run(argc, argv);
}
