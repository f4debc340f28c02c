// SPDX-License-Identifier: Apache-2.0
//
// A training step with AdamW and clipping by norm, on one core: fabric::optim through Fabric beside torch::optim in a
// hand-written loop, and beside Python's AdamW(fused=True) if tools/install-python has made its environment. In turns,
// since what else the machine does changes with time.
//   bench_optimizers OUT.json [--quick]
//   bench_optimizers LOOP SIZE STEPS     only runs a loop, "fabric" or "by_hand", for a profiler

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "loops.hpp"
#include "support/program.hpp"
#include "support/report.hpp"

namespace {

using namespace bench;

/// How Python is asked for the same network.
std::string in_python(const Size& size) { return fmt::format("mlp {} {}", size.layers, size.width); }
std::string in_python(const GptSize& size) {
  return fmt::format("gpt {} {} {} {} {} {}", size.layers, size.width, size.heads, size.vocabulary, size.positions,
                     size.tokens);
}

/// The loop of another program: runs steps and keeps what it said about its time.
struct Python {
  Python() : program({FABRIC_SOURCE_DIR "/tools/run-python", FABRIC_SOURCE_DIR "/bench/optimizers/optimizers.py"}) {}

  double run(const std::string& net, int steps) {
    std::istringstream answer(program.ask(fmt::format("{} {}", net, steps)));
    double loss = 0;
    answer >> microseconds >> loss;
    return loss;
  }

  Program program;
  double microseconds = 0;
};

/// Null where there is none.
std::unique_ptr<Python> start_python() {
  try {
    auto python = std::make_unique<Python>();
    python->run("mlp 1 1", 1);
    return python;
  } catch (const std::exception&) {
    fmt::print("without Python's fused AdamW: tools/install-python makes its environment\n");
    return nullptr;
  }
}

struct Contestant {
  std::string name;
  Loop loop;
  Samples microseconds{};
};

/// Runs all in turns, after steps that warm up and show that all train alike, and adds the rows.
template <class AnySize>
void compare(const AnySize& size, int rounds, double seconds_a_round, Python* python, Report& report) {
  std::vector<Contestant> all{{"Fabric", with_fabric(size)}, {"torch::optim", by_hand(size)}};
  if (python != nullptr) {
    all.push_back({"Python fused", [&](int steps) { return python->run(in_python(size), steps); }});
  }
  constexpr int warm_up = 3;
  const double start = now();
  const double loss = all[0].loop(warm_up);
  const int steps = std::max(1, static_cast<int>(seconds_a_round / (now() - start) * warm_up));
  for (std::size_t i = 1; i < all.size(); ++i) {
    const double other = all[i].loop(warm_up);
    if (std::abs(other - loss) <= 1e-3 * loss) continue;
    throw std::runtime_error(fmt::format("{}: the losses differ: {} here, {} in {}", size.name(), loss, other, all[i].name));
  }
  for (int round = 0; round < rounds; ++round) {
    for (std::size_t turn = 0; turn < all.size(); ++turn) {
      Contestant& contestant = all[(turn + static_cast<std::size_t>(round)) % all.size()];
      const double before = now();
      contestant.loop(steps);
      const bool is_python = contestant.name == "Python fused";  // which takes its own time, without the asking
      contestant.microseconds.add(is_python ? python->microseconds : (now() - before) / steps * 1e6);
    }
  }
  for (std::size_t i = 1; i < all.size(); ++i) {
    report.add({size.name(), "us/step", all[0].microseconds, all[i].microseconds, all[i].name});
  }
}

void run_loop(std::string_view loop, std::string_view name, int steps) {
  const auto run = [&](const auto& size) {
    if (size.name() == name) (loop == "fabric" ? with_fabric(size) : by_hand(size))(steps);
  };
  for (const Size& size : sizes) run(size);
  run(GptSize{});
}

}  // namespace

int main(int argc, char** argv) try {
  at::set_num_threads(1);
  if (argc == 4) {
    run_loop(argv[1], argv[2], std::atoi(argv[3]));
    return 0;
  }
  const Arguments arguments = parse(argc, argv);
  const auto python = arguments.quick ? nullptr : start_python();
  Report report;
  for (const Size& size : sizes) {
    compare(size, arguments.quick ? 3 : 41, arguments.quick ? 0.01 : 0.1, python.get(), report);
  }
  if (arguments.quick) {
    compare(GptSize{.layers = 2, .width = 64, .heads = 4, .vocabulary = 16000}, 3, 0.01, nullptr, report);
  } else {
    compare(GptSize{}, 9, 0, python.get(), report);
  }
  report.write(arguments.json);
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "optimizers: {}\n", error.what());
  return 1;
}
