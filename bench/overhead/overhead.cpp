// SPDX-License-Identifier: Apache-2.0
//
// What the library costs on one device: a hand-written loop beside the same one with Fabric, in instructions and in
// time.
//   bench_overhead OUT.json [--quick]
//   bench_overhead LOOP SIZE STEPS     only runs a loop; valgrind counts the instructions of this

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include <fmt/format.h>
#include <unistd.h>

#include "loops.hpp"
#include "support/program.hpp"
#include "support/report.hpp"

namespace {

using namespace bench;

Loop make_loop(std::string_view name, const Size& size) { return name == "fabric" ? with_fabric(size) : by_hand(size); }

void run_loop(std::string_view name, std::string_view size_name, int steps) {
  for (const Size& size : sizes) {
    if (size.name() == size_name) make_loop(name, size)(steps);
  }
}

/// What the whole program executes when it trains for that many steps.
double instructions(const std::string& loop, const Size& size, int steps) {
  const auto path = std::filesystem::temp_directory_path() / fmt::format("overhead.{}.callgrind", getpid());
  Program({"valgrind", "--tool=callgrind", "--quiet", "--callgrind-out-file=" + path.string(),
           std::filesystem::read_symlink("/proc/self/exe").string(), loop, size.name(), std::to_string(steps)})
      .wait();
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("totals: ")) continue;
    std::filesystem::remove(path);
    return std::stod(line.substr(line.find(' ')));
  }
  throw std::runtime_error("callgrind left no total in " + path.string());
}

/// The difference of two runs: what comes before the first step is the same in both.
double instructions_per_step(const std::string& loop, const Size& size, int steps) {
  constexpr int few = 10;
  return (instructions(loop, size, few + steps) - instructions(loop, size, few)) / steps;
}

Row wall_time(const Size& size, int rounds, double seconds_a_round) {
  const Loop loops[] = {with_fabric(size), by_hand(size)};
  Row row{.name = size.name(), .unit = "us/step", .ours = {}, .baseline = {}, .baseline_name = "hand-written"};
  Samples* samples[] = {&row.ours, &row.baseline};
  double before = now();
  constexpr int warm_up = 10;
  if (loops[0](warm_up) != loops[1](warm_up)) throw std::runtime_error("the two loops differ in their losses");
  const int steps = std::max(1, static_cast<int>(seconds_a_round / (now() - before) * 2 * warm_up));
  for (int round = 0; round < rounds; ++round) {
    for (const int turn : {0, 1}) {
      const int which = (round + turn) % 2;
      before = now();
      loops[which](steps);
      samples[which]->add((now() - before) / steps * 1e6);
    }
  }
  return row;
}

bool has_valgrind() { return std::system("valgrind --version > /dev/null 2>&1") == 0; }

}  // namespace

int main(int argc, char** argv) try {
  at::set_num_threads(1);
  if (argc == 4) {
    run_loop(argv[1], argv[2], std::atoi(argv[3]));
    return 0;
  }
  const Arguments arguments = parse(argc, argv);
  Report report;
  for (const Size& size : sizes) report.add(wall_time(size, arguments.quick ? 3 : 41, arguments.quick ? 0.01 : 0.1));
  if (!arguments.quick) {
    if (!has_valgrind()) throw std::runtime_error("valgrind, which counts instructions, is not installed");
    for (const Size& size : sizes) {
      report.add({.name = size.name(),
                  .unit = "instructions/step",
                  .ours = {instructions_per_step("fabric", size, 100)},
                  .baseline = {instructions_per_step("by_hand", size, 100)},
                  .baseline_name = "hand-written"});
    }
  }
  report.write(arguments.json);
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "overhead: {}\n", error.what());
  return 1;
}
