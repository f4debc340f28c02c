// SPDX-License-Identifier: Apache-2.0
//
// How a job of several processes begins and ends. Run with `job NAME` as arguments, this program is such a job; its
// test cases start it so and look at what it prints, at its exit code and at what it leaves behind.
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

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

// ---- The jobs ----

/// A fabric on two ranks that have said their process ids.
OnCpu& launched() {
  static OnCpu fabric({.devices = 2});
  fabric.launch();
  say_who(fabric.global_rank());
  fabric.barrier();
  return fabric;
}

int wait_forever(OnCpu& fabric) {
  for (;;) fabric.barrier();  // in a collective that the other never joins
}

const std::map<std::string, std::function<int()>> jobs{
    {"report",
     [] {
       OnCpu fabric({.devices = 2});
       fabric.launch();
       Fabric<Cpu, Ddp, F64> second({.devices = 2});  // meets the same peers at the same port
       second.launch();
       const auto sum = second.all_reduce(torch::tensor(fabric.global_rank() + 1), ReduceOp::sum).item<int>();
       say("global=" + std::to_string(fabric.global_rank()) + " local=" + std::to_string(fabric.local_rank()) +
           " node=" + std::to_string(fabric.node_rank()) + " size=" + std::to_string(fabric.world_size()) + " sum=" +
           std::to_string(sum) + " LOCAL_RANK=" + variable("LOCAL_RANK") + " NODE_RANK=" + variable("NODE_RANK") +
           " WORLD_SIZE=" + variable("WORLD_SIZE") + " MASTER_ADDR=" + variable("MASTER_ADDR") +
           " MASTER_PORT=" + variable("MASTER_PORT") + " FABRIC_PARENT=" + variable("FABRIC_PARENT"));
       fabric.print("printed by ", fabric.global_rank(), " of ", fabric.world_size());
       return 0;
     }},
    {"throw",
     [] {
       auto& fabric = launched();
       if (fabric.global_rank() == 1) throw std::runtime_error("the reason of rank 1");
       return wait_forever(fabric);
     }},
    {"throw_on_rank_0",
     [] {
       auto& fabric = launched();
       if (fabric.global_rank() == 0) throw std::runtime_error("the reason of rank 0");
       return wait_forever(fabric);
     }},
    {"exit_3",
     [] {
       auto& fabric = launched();
       if (fabric.global_rank() == 1) std::exit(3);
       return wait_forever(fabric);
     }},
    {"sleep",
     [] {
       auto& fabric = launched();
       if (fabric.global_rank() == 1) {
         say("rank 1 sleeps");
         std::this_thread::sleep_for(std::chrono::hours(1));
       }
       return wait_forever(fabric);
     }},
    {"ignore_sigterm",
     [] {
       std::signal(SIGTERM, SIG_IGN);
       OnCpu fabric({.devices = 3});
       fabric.launch();
       say_who(fabric.global_rank());
       fabric.barrier();
       if (fabric.global_rank() == 1) std::exit(3);
       std::this_thread::sleep_for(std::chrono::hours(1));
       return 0;
     }},
    {"fail_after_rank_0",
     [] {
       auto& fabric = launched();
       if (fabric.global_rank() == 0) return 0;
       std::this_thread::sleep_for(std::chrono::milliseconds(500));
       return 5;
     }},
    {"late_success",
     [] {
       auto& fabric = launched();
       if (fabric.global_rank() == 0) return 0;
       std::this_thread::sleep_for(std::chrono::milliseconds(500));
       say("rank 1 is done");
       return 0;
     }},
    {"different_shapes",
     [] {
       auto& fabric = launched();
       auto model = fabric.setup(torch::nn::Linear(2 + fabric.global_rank(), 1));
       return 0;
     }},
    {"misuse",
     [] {
       OnCpu fabric({.devices = 2});
       torch::nn::Linear linear(1, 1);
       for (const auto& attempt : std::vector<std::function<void()>>{
                [&] { (void)fabric.setup(linear); },
                [&] { (void)fabric.setup_dataloader(torch::data::datasets::TensorDataset(torch::ones({4})), {}); },
                [&] {
                  fabric.launch();
                  fabric.launch();
                }}) {
         try {
           attempt();
         } catch (const Error& error) {
           say(error.what());
         }
       }
       return 0;
     }},
};

// ---- What the test cases need ----

Process job(const std::string& name, const std::vector<Process::Variable>& variables = {}) {
  return Process({"/proc/self/exe", "job", name}, variables);
}

std::string value_of(const std::string& output, const std::string& line, const std::string& name) {
  const auto begin = output.find(name + "=", output.find(line));
  REQUIRE(begin != std::string::npos);
  const auto value = begin + name.size() + 1;
  return output.substr(value, output.find_first_of(" \n", value) - value);
}

int free_port() {
  const int socket = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  REQUIRE(bind(socket, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
  socklen_t size = sizeof address;
  REQUIRE(getsockname(socket, reinterpret_cast<sockaddr*>(&address), &size) == 0);
  close(socket);
  return ntohs(address.sin_port);
}

}  // namespace

TEST_CASE("[issue-3.5] the program is started again for the other ranks, which know who they are and where to meet") {
  auto process = job("report");
  REQUIRE(process.wait() == 0);
  const std::string& output = process.output();
  INFO(output);
  const std::string port = value_of(output, "global=0", "MASTER_PORT");
  CHECK(std::atoi(port.c_str()) > 0);
  for (const std::string rank : {"0", "1"}) {
    CHECK(output.find("global=" + rank + " local=" + rank + " node=0 size=2 sum=3 LOCAL_RANK=" + rank +
                      " NODE_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=" + port + " FABRIC_PARENT=-") !=
          std::string::npos);
  }
}

TEST_CASE("[issue-3.6] only rank 0 prints") {
  auto process = job("report");
  REQUIRE(process.wait() == 0);
  CHECK_THAT(process.output(), ContainsSubstring("printed by 0 of 2") && !ContainsSubstring("printed by 1"));
}

TEST_CASE("[issue-3.5] a MASTER_PORT that the user gives is the port") {
  const std::string port = std::to_string(free_port());
  auto process = job("report", {{"MASTER_PORT", port}});
  REQUIRE(process.wait() == 0);
  for (const std::string line : {"global=0", "global=1"})
    CHECK(value_of(process.output(), line, "MASTER_PORT") == port);
}

TEST_CASE("[issue-3.5] jobs side by side choose different ports and do not mix") {
  auto one = job("report");
  auto two = job("report");
  REQUIRE(one.wait() == 0);
  REQUIRE(two.wait() == 0);
  CHECK(value_of(one.output(), "global=0", "sum") == "3");
  CHECK(value_of(one.output(), "global=0", "MASTER_PORT") != value_of(two.output(), "global=0", "MASTER_PORT"));
}

TEST_CASE("[issue-3.5] processes that somebody else starts one by one join by LOCAL_RANK") {
  const std::string port = std::to_string(free_port());
  auto zero = job("report", {{"LOCAL_RANK", "0"}, {"MASTER_PORT", port}});
  auto one = job("report", {{"LOCAL_RANK", "1"}, {"MASTER_PORT", port}});
  REQUIRE(zero.wait() == 0);
  REQUIRE(one.wait() == 0);
  CHECK_THAT(zero.output(), ContainsSubstring("global=0") && !ContainsSubstring("global=1"));
  CHECK_THAT(one.output(), ContainsSubstring("global=1 local=1 node=0 size=2 sum=3"));
}

TEST_CASE(
    "[issue-3.5] a rank that fails takes the job down within 10 seconds, with its reason and exit code, and leaves "
    "nobody") {
  struct Failure {
    const char* name;
    int code;
    const char* reason;
  };
  for (const Failure& failure :
       {Failure{"throw", 128 + SIGABRT, "rank 1 of 2"}, Failure{"exit_3", 3, "ended with exit code 3"}}) {
    INFO(failure.name);
    auto process = job(failure.name);
    REQUIRE(process.wait_for("rank 1 is process"));
    const auto start = std::chrono::steady_clock::now();
    const int code = process.wait(20);
    INFO(process.output());
    CHECK(code == failure.code);
    CHECK(seconds_since(start) < 10);
    CHECK_THAT(process.output(), ContainsSubstring(failure.reason));
    if (std::string(failure.name) == "throw") CHECK_THAT(process.output(), ContainsSubstring(": the reason of rank 1"));
    CHECK(ends(process_of(process.output(), 1)));
  }
}

TEST_CASE("[issue-3.5] a rank that is killed takes the job down with the signal's name") {
  auto process = job("sleep");
  REQUIRE(process.wait_for("rank 0 is process"));
  REQUIRE(process.wait_for("rank 1 sleeps"));
  const auto start = std::chrono::steady_clock::now();
  kill(process_of(process.output(), 1), SIGKILL);
  CHECK(process.wait(20) == 128 + SIGKILL);
  CHECK(seconds_since(start) < 10);
  CHECK_THAT(process.output(),
             ContainsSubstring("rank 1 of 2") && ContainsSubstring("was killed by signal 9 (Killed)"));
}

TEST_CASE("[issue-3.5] when rank 0 fails the others go too") {
  auto process = job("throw_on_rank_0");
  REQUIRE(process.wait_for("rank 1 is process"));
  const auto start = std::chrono::steady_clock::now();
  CHECK(process.wait(20) != 0);
  CHECK(process.wait(0) != Process::running);
  CHECK(seconds_since(start) < 10);
  CHECK_THAT(process.output(), ContainsSubstring("the reason of rank 0"));
  CHECK(ends(process_of(process.output(), 1)));
}

TEST_CASE("[issue-3.5] when rank 0 is killed, even without a chance to say so, the others go too") {
  auto process = job("sleep");
  REQUIRE(process.wait_for("rank 1 sleeps"));  // not in a collective that would fail
  const auto start = std::chrono::steady_clock::now();
  process.kill(SIGKILL);
  CHECK(process.wait(20) == 128 + SIGKILL);  // and nobody holds its output any more
  CHECK(seconds_since(start) < 10);
}

TEST_CASE("[issue-3.5] ranks that ignore SIGTERM are ended all the same") {
  auto process = job("ignore_sigterm");
  REQUIRE(process.wait_for("rank 2 is process"));
  const auto start = std::chrono::steady_clock::now();
  CHECK(process.wait(20) == 3);
  CHECK(seconds_since(start) < 10);
  CHECK(ends(process_of(process.output(), 2)));
}

TEST_CASE("[issue-3.5] rank 0 waits for the others at its end, and their failure is the job's") {
  auto failing = job("fail_after_rank_0");
  CHECK(failing.wait() == 5);
  CHECK_THAT(failing.output(), ContainsSubstring("rank 1 of 2") && ContainsSubstring("exit code 5"));
  auto succeeding = job("late_success");
  CHECK(succeeding.wait() == 0);
  CHECK_THAT(succeeding.output(), ContainsSubstring("rank 1 is done"));
}

TEST_CASE("[issue-3.3] modules of different shapes on the ranks end the job quickly, with the shape that differs") {
  auto process = job("different_shapes");
  REQUIRE(process.wait_for("rank 1 is process"));
  const auto start = std::chrono::steady_clock::now();
  CHECK(process.wait(20) > 0);
  CHECK(seconds_since(start) < 10);
  CHECK_THAT(
      process.output(),
      ContainsSubstring("rank 0 has 'weight: Float [1, 2], trained', rank 1 has 'weight: Float [1, 3], trained'"));
}

TEST_CASE("[issue-3.6] setup before launch, and launch twice, are refused with what to do") {
  auto process = job("misuse");
  REQUIRE(process.wait() == 0);
  CHECK_THAT(process.output(), ContainsSubstring("setup before launch(): call fabric.launch() first") &&
                                   ContainsSubstring("setup_dataloader before launch()") &&
                                   ContainsSubstring("launch() was called twice"));
}

TEST_CASE("[issue-3.5] variables of a launcher that contradict the options are refused") {
  auto process = job("report", {{"TORCHELASTIC_RUN_ID", "x"}, {"RANK", "0"}, {"LOCAL_RANK", "0"}, {"WORLD_SIZE", "3"}});
  CHECK(process.wait() != 0);
  CHECK_THAT(process.output(), ContainsSubstring("--nproc-per-node"));
}

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "job") return jobs.at(argv[2])();
  return Catch::Session().run(argc, argv);
}
