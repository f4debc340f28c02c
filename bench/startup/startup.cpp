// SPDX-License-Identifier: Apache-2.0
//
// From the start of a program to the end of its first training step on two processes, beside Python's Lightning Fabric,
// if tools/install-python has made its environment. Rounds in turns, since what else the machine does changes with
// time.
//   bench_startup OUT.json [--quick]
//
// With `job` as its argument, this program is the one that is measured.

#include <cstdio>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <fabric/fabric.hpp>
#include <fmt/format.h>
#include <torch/torch.h>

#include "support/program.hpp"
#include "support/report.hpp"

namespace {

using namespace bench;

int job() {
  fabric::Fabric<fabric::Cpu, fabric::Ddp, fabric::F32> fabric({.devices = 2});
  fabric.launch();
  torch::nn::Sequential net(torch::nn::Linear(64, 64), torch::nn::ReLU(), torch::nn::Linear(64, 1));
  auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.01));
  optimizer.zero_grad();
  fabric.backward(model(torch::ones({32, 64})).mean());
  optimizer.step();
  fabric.print("stepped");
  return 0;
}

/// Milliseconds until the program says that it has made its first step; then waits for its end.
double measure(const std::vector<std::string>& command) {
  const double start = now();
  Program program(command);
  const std::string said = program.ask("");
  const double took = (now() - start) * 1e3;
  if (said != "stepped") throw std::runtime_error(command.back() + " said: " + said);
  return took;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc == 2 && std::string(argv[1]) == "job") return job();
  const Arguments arguments = parse(argc, argv);
  const std::vector<std::string> ours{"/proc/self/exe", "job"};
  const std::vector<std::string> python{FABRIC_SOURCE_DIR "/tools/run-python",
                                        FABRIC_SOURCE_DIR "/bench/startup/startup.py"};
  measure(ours);  // files are read for the first time
  try {
    measure(python);
  } catch (const std::exception&) {
    fmt::print("without Python's Lightning Fabric: tools/install-python makes its environment\n");
    Report().write(arguments.json);
    return 0;
  }
  Samples our_milliseconds;
  Samples python_milliseconds;
  const int rounds = arguments.quick ? 1 : 7;
  for (int round = 0; round < rounds; ++round) {
    our_milliseconds.add(measure(ours));
    python_milliseconds.add(measure(python));
  }
  Report report;
  report.add({"2 processes to the first step", "ms", our_milliseconds, python_milliseconds, "Python Lightning Fabric"});
  report.write(arguments.json);
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "startup: {}\n", error.what());
  return 1;
}
