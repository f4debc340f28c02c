// SPDX-License-Identifier: Apache-2.0
//
// Strategies that shard, over gloo: the time of a step beside Python's FSDP2 and DDP, and how much memory a large model
// takes beside what it should.
//   bench_sharding OUT.json [--quick]
// Each strategy runs in processes of its own, which measure when they are told to, in turns, since what else the
// machine does changes with time. To measure one alone:
//   bench_sharding --measure time --strategy ddp --model small --devices 2      then lines with a number of steps
//   bench_sharding --measure memory --strategy ddp --model medium --devices 4   prints JSON

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <fabric/shard/traffic.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "support/program.hpp"
#include "support/report.hpp"
#include "task.hpp"
#include "transformer.hpp"

namespace {

using namespace bench;

/// Flags of the strategies whose steps are timed, and of those whose memory is measured.
const std::vector<std::string> timed{"ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"};
const std::vector<std::string> weighed{"deepspeed_stage_1",         "deepspeed_stage_2",
                                       "deepspeed_stage_3",         "deepspeed_stage_1_offload",
                                       "deepspeed_stage_3_offload", "deepspeed_stage_3_offload_nvme"};

constexpr int time_devices = 2;
constexpr int memory_devices = 4;

std::vector<std::string> command_for(const std::string& measure, const std::string& strategy, const std::string& model,
                                     int devices) {
  return {"/proc/self/exe", "--measure", measure,     "--strategy",           strategy,
          "--model",        model,       "--devices", std::to_string(devices)};
}

struct Contestant {
  std::string name;
  std::unique_ptr<Program> program;
  Samples microseconds{};
  double loss = 0;

  void step(int steps) {
    std::istringstream answer(program->ask(std::to_string(steps)));
    double took = 0;
    if (!(answer >> took >> loss)) throw std::runtime_error(name + " gave no time");
    microseconds.add(took);
  }
};

Contestant python_contestant(const std::string& name, const std::string& kind, const Shape& shape) {
  std::vector<std::string> command{FABRIC_SOURCE_DIR "/tools/run-python",
                                   FABRIC_SOURCE_DIR "/bench/sharding/sharding.py", kind, std::to_string(time_devices)};
  for (const std::int64_t number :
       {std::int64_t{shape.layers}, shape.width, shape.heads, shape.rows, shape.vocabulary, shape.tokens}) {
    command.push_back(std::to_string(number));
  }
  return {name, std::make_unique<Program>(command)};
}

std::string millions(const Shape& shape) {
  return fmt::format("{:.1f}M", static_cast<double>(shape.parameters()) / 1e6);
}

/// Times all of them in turns on one model, and adds each of ours beside each of Python's.
void compare_times(const std::string& model, bool quick, Report& report) {
  const Shape shape = shape_of(model);
  std::vector<Contestant> ours;
  ours.reserve(timed.size());
  for (const std::string& strategy : timed) {
    ours.push_back({strategy, std::make_unique<Program>(command_for("time", strategy, model, time_devices))});
  }
  std::vector<Contestant> theirs;
  if (!quick) {
    theirs.push_back(python_contestant("Python FSDP2", "fsdp2", shape));
    theirs.push_back(python_contestant("Python DDP", "ddp", shape));
  }
  std::vector<Contestant*> all;
  for (auto* list : {&ours, &theirs}) {
    for (Contestant& contestant : *list) all.push_back(&contestant);
  }
  // The first steps have more to do; and their losses show that all train the same.
  for (auto contestant = all.begin(); contestant != all.end();) {
    try {
      (*contestant)->step(3);
      (*contestant)->microseconds = {};
      ++contestant;
    } catch (const std::exception&) {
      if (!(*contestant)->name.starts_with("Python")) throw;
      fmt::print("without {}: tools/install-python makes its environment\n", (*contestant)->name);
      contestant = all.erase(contestant);
    }
  }
  for (const Contestant* contestant : all) {
    if (std::abs(contestant->loss - all.front()->loss) > 1e-3 * all.front()->loss) {
      throw std::runtime_error(fmt::format("the losses differ: {} {}, {} {}", all.front()->name, all.front()->loss,
                                           contestant->name, contestant->loss));
    }
  }
  const int rounds = quick ? 2 : 15;
  const int steps = quick ? 1 : model == "small" ? 10 : 2;
  for (int round = 0; round < rounds; ++round) {
    for (std::size_t turn = 0; turn < all.size(); ++turn) {
      all[(turn + static_cast<std::size_t>(round)) % all.size()]->step(steps);
    }
  }
  for (const Contestant& contestant : ours) {
    const std::string name = fmt::format("{} {}", millions(shape), contestant.name);
    bool compared = false;
    for (const Contestant* other : all) {
      if (!other->name.starts_with("Python")) continue;
      report.add({name, "us/step", contestant.microseconds, other->microseconds, other->name});
      compared = true;
    }
    if (!compared) report.add({name, "us/step", contestant.microseconds, {}, ""});
  }
}

/// Measures the memory of a model under each strategy, beside what it should be.
void compare_memory(const std::string& model, Report& report) {
  constexpr double mebibyte = 1 << 20;
  for (const std::string& strategy : weighed) {
    Program program(command_for("memory", strategy, model, memory_devices));
    const auto answer = nlohmann::json::parse(program.ask(""));
    double sum = 0;
    std::string text;
    for (const auto& [part, bytes] : answer["parts"].items()) {
      sum += bytes.get<double>() / mebibyte;
      text += fmt::format("{}{} {:.0f}", text.empty() ? "" : " + ", part, bytes.get<double>() / mebibyte);
    }
    fmt::print("{}: {} = {:.0f} MiB; {:.0f} when built\n", strategy, text, sum,
               answer["built"].get<double>() / mebibyte);
    report.add({fmt::format("{} {}, peak of each of {} ranks", millions(shape_of(model)), strategy, memory_devices),
                "MiB",
                {answer["peak"].get<double>() / mebibyte},
                {sum},
                "the formula"});
  }
}

/// Prints what a rank sends in a step, in messages of gloo and in bytes, in jobs of any size. (A test counts them at
/// the socket for 2, 4 and 8 ranks.)
void print_traffic(const std::string& model) {
  const Shape shape = shape_of(model);
  const auto bytes = static_cast<std::uint64_t>(2 * shape.block_parameters());  // of bfloat16, in one unit
  fmt::print("{} in bf16-mixed, {} units: messages and MiB that each rank sends in a step\n", millions(shape),
             shape.layers);
  for (std::uint64_t ranks = 64; ranks <= 4096; ranks *= 2) {
    fmt::print("{:>5} ranks:", ranks);
    for (const int stage : {1, 2, 3}) {
      const std::uint64_t padded = (bytes + 32 * ranks - 1) / (32 * ranks) * (32 * ranks);  // 16 elements a rank
      const fabric::Traffic step =
          static_cast<std::uint64_t>(shape.layers) * fabric::sharded_step(stage, padded, padded, ranks);
      fmt::print("  stage {} {:>7} {:>7.1f}", stage, step.messages, static_cast<double>(step.bytes) / (1 << 20));
    }
    fmt::print("\n");
  }
}

/// The task of `--measure`; null where there is none. Throws std::runtime_error for flags that nobody knows.
std::unique_ptr<Task> task_of(int argc, char** argv) {
  if (argc < 2 || std::string_view(argv[1]) != "--measure") return nullptr;
  Task task;
  const std::map<std::string_view, std::string*> flags{{"--measure", &task.measure},
                                                       {"--strategy", &task.strategy},
                                                       {"--model", &task.model},
                                                       {"--devices", &task.devices}};
  for (int i = 1; i + 1 < argc; i += 2) {
    const auto flag = flags.find(argv[i]);
    if (flag == flags.end()) throw std::runtime_error(fmt::format("unknown flag {}", argv[i]));
    *flag->second = argv[i + 1];
  }
  return std::make_unique<Task>(task);
}

}  // namespace

int main(int argc, char** argv) try {
  if (const auto task = task_of(argc, argv)) {
    if (task->measure == "time") {
      measure_time(*task);
    } else if (task->measure == "memory") {
      measure_memory(*task);
    } else {
      throw std::runtime_error("--measure takes time or memory");
    }
    return 0;
  }
  const Arguments arguments = parse(argc, argv);
  setenv("OMP_NUM_THREADS", "1", 1);
  Report report;
  compare_times("small", arguments.quick, report);
  if (!arguments.quick) compare_times("medium", arguments.quick, report);
  compare_memory(arguments.quick ? "small" : "large", report);
  print_traffic("large");
  report.write(arguments.json);
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "sharding: {}\n", error.what());
  return 1;
}
