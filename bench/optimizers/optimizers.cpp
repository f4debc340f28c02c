// SPDX-License-Identifier: Apache-2.0
//
// A training step with AdamW and clipping by norm, on one core: fabric::optim through Fabric beside torch::optim in a
// hand-written loop, and beside Python's AdamW(fused=True) if tools/install-python has made its environment. Each in a
// process of its own, so that none inherits another's heap; in turns, since what else the machine does changes with
// time; and in processor time, which is a step's time on a core that has nothing else to do.
//   bench_optimizers OUT.json [--quick]
//   echo mlp 4 64 100 | bench_optimizers serve fabric    only runs a loop, "fabric" or "by_hand", for a profiler

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <ctime>
#include <exception>
#include <filesystem>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "loops.hpp"
#include "support/program.hpp"
#include "support/report.hpp"

namespace {

using namespace bench;

/// A network as one process asks another for it.
std::string text_of(const Size& size) { return fmt::format("mlp {} {}", size.layers, size.width); }
std::string text_of(const GptSize& size) {
  return fmt::format("gpt {} {} {} {} {} {}", size.layers, size.width, size.heads, size.vocabulary, size.positions,
                     size.tokens);
}

Loop make_loop(const std::string& contestant, const std::string& net) {
  const auto make = [&](const auto& size) { return contestant == "fabric" ? with_fabric(size) : by_hand(size); };
  std::istringstream words(net);
  std::string kind;
  words >> kind;
  if (kind == "mlp") {
    Size size{};
    words >> size.layers >> size.width;
    return make(size);
  }
  GptSize size;
  words >> size.layers >> size.width >> size.heads >> size.vocabulary >> size.positions >> size.tokens;
  return make(size);
}

/// Processor seconds of this process so far.
double processor_seconds() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

/// Reads lines "NET STEPS" and answers each with the microseconds per step and the last loss, as optimizers.py does.
void serve(const std::string& contestant) {
  std::map<std::string, Loop> loops;
  for (std::string line; std::getline(std::cin, line);) {
    const std::size_t space = line.rfind(' ');
    const std::string net = line.substr(0, space);
    const int steps = std::stoi(line.substr(space));
    if (!loops.contains(net)) loops[net] = make_loop(contestant, net);
    const double start = processor_seconds();
    const double loss = loops[net](steps);
    fmt::print("{} {}\n", (processor_seconds() - start) / steps * 1e6, loss);
    std::fflush(stdout);
  }
}

/// A process that serves one of the loops.
class Contestant {
 public:
  Contestant(std::string name, std::vector<std::string> command)
      : name(std::move(name)), program_(std::make_unique<Program>(std::move(command))) {}

  /// Trains for that many steps; returns the last loss.
  double run(const std::string& net, int steps) {
    std::istringstream answer(program_->ask(fmt::format("{} {}", net, steps)));
    double loss = 0;
    answer >> microseconds >> loss;
    return loss;
  }

  std::string name;
  double microseconds = 0;  ///< Of a step in the last run.

 private:
  std::unique_ptr<Program> program_;
};

/// The contestants, ours first; Python only if it is there and asked for.
std::vector<Contestant> start_all(bool with_python) {
  const std::string self = std::filesystem::read_symlink("/proc/self/exe").string();
  std::vector<Contestant> all;
  all.push_back({"Fabric", {self, "serve", "fabric"}});
  all.push_back({"torch::optim", {self, "serve", "by_hand"}});
  if (!with_python) return all;
  try {
    Contestant python("Python fused",
                      {FABRIC_SOURCE_DIR "/tools/run-python", FABRIC_SOURCE_DIR "/bench/optimizers/optimizers.py"});
    python.run("mlp 1 1", 1);
    all.push_back(std::move(python));
  } catch (const std::exception&) {
    fmt::print("without Python's fused AdamW: tools/install-python makes its environment\n");
  }
  return all;
}

/// Runs all in turns, after steps that warm up and show that all train alike, and adds the rows.
template <class AnySize>
void compare(const AnySize& size, int rounds, double seconds_a_round, std::vector<Contestant>& all, Report& report) {
  const std::string net = text_of(size);
  constexpr int warm_up = 3;
  const double loss = all[0].run(net, warm_up);
  const int steps = std::max(1, static_cast<int>(seconds_a_round / all[0].microseconds * 1e6));
  for (Contestant& contestant : all) {
    if (&contestant == &all[0]) continue;
    const double other = contestant.run(net, warm_up);
    if (std::abs(other - loss) <= 1e-3 * loss) continue;
    throw std::runtime_error(
        fmt::format("{}: the losses differ: {} with Fabric, {} with {}", size.name(), loss, other, contestant.name));
  }
  std::vector<Samples> samples(all.size());
  for (int round = 0; round < rounds; ++round) {
    for (std::size_t turn = 0; turn < all.size(); ++turn) {
      const std::size_t which = (turn + static_cast<std::size_t>(round)) % all.size();
      all[which].run(net, steps);
      samples[which].add(all[which].microseconds);
    }
  }
  for (std::size_t i = 1; i < all.size(); ++i) {
    report.add({size.name(), "us/step", samples[0], samples[i], all[i].name});
  }
}

}  // namespace

int main(int argc, char** argv) try {
  at::set_num_threads(1);
  if (argc == 3 && std::string(argv[1]) == "serve") {
    serve(argv[2]);
    return 0;
  }
  const Arguments arguments = parse(argc, argv);
  auto all = start_all(!arguments.quick);
  Report report;
  for (const Size& size : sizes) compare(size, arguments.quick ? 3 : 41, arguments.quick ? 0.01 : 0.1, all, report);
  if (arguments.quick) {
    compare(GptSize{.layers = 2, .width = 64, .heads = 4, .vocabulary = 16000}, 3, 0.01, all, report);
  } else {
    compare(GptSize{}, 9, 0, all, report);
  }
  report.write(arguments.json);
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "optimizers: {}\n", error.what());
  return 1;
}
