// SPDX-License-Identifier: Apache-2.0
//
// What the library costs on one device: a hand-written loop beside the same one with Fabric, in instructions and in
// time.
//   bench_overhead OUT.json [--quick]
//   bench_overhead LOOP SIZE STEPS     only runs a loop; valgrind counts the instructions of this

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>

#include <fmt/format.h>

#include "loops.hpp"
#include "support/instructions.hpp"
#include "support/program.hpp"
#include "support/report.hpp"

namespace {

using namespace bench;

Loop make_loop(std::string_view name, const Size& size) {
  if (name == "fabric") return with_fabric(size);
  if (name == "by_hand") return by_hand(size);
  throw std::invalid_argument("there is no loop '" + std::string(name) + "', but fabric and by_hand");
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

}  // namespace

int main(int argc, char** argv) try {
  at::set_num_threads(1);
  if (argc == 4) {
    make_loop(argv[1], size_named(argv[2]))(std::atoi(argv[3]));
    return 0;
  }
  const Arguments arguments = parse(argc, argv);
  Report report;
  for (const Size& size : sizes) report.add(wall_time(size, arguments.quick ? 3 : 41, arguments.quick ? 0.01 : 0.1));
  if (!arguments.quick) {
    require_valgrind();
    for (const Size& size : sizes) {
      const auto instructions_of = [&size](const char* loop) {
        return [&size, loop](int steps) { return instructions({}, {loop, size.name(), std::to_string(steps)}); };
      };
      report.add({.name = size.name(),
                  .unit = "instructions/step",
                  .ours = {per_step(instructions_of("fabric"), 100)},
                  .baseline = {per_step(instructions_of("by_hand"), 100)},
                  .baseline_name = "hand-written"});
    }
  }
  report.write(arguments.json);
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "overhead: {}\n", error.what());
  return 1;
}
