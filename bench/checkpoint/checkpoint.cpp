// SPDX-License-Identifier: Apache-2.0
//
// Saving and loading 500 MB of weights: this library, beside what the disk does (dd with fsync) and, if
// tools/install-python has made its environment, Python's torch.save (with fsync, without which it only fills memory)
// and torch.load. In turns, since a disk's speed changes with time. Files lie in FABRIC_BENCH_FOLDER, or the build
// folder.
//   bench_checkpoint OUT.json [--quick]

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <fabric/checkpoint.hpp>
#include <fabric/fabric.hpp>
#include <fmt/format.h>
#include <torch/torch.h>

#include "support/program.hpp"
#include "support/report.hpp"

namespace {

using namespace bench;
using OnCpu = fabric::Fabric<fabric::Cpu, fabric::SingleDevice, fabric::F32>;

/// A number of /proc/self/status in MB.
double status_mb(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(key + ":")) return std::stod(line.substr(key.size() + 1)) / 1000;
  }
  throw std::runtime_error("no " + key + " in /proc/self/status");
}

/// What `function` adds to the largest memory of this process, in MB. Pages of a mapped file do not count for a load:
/// the system takes them back when it needs memory.
template <class Function>
double added_mb(const Function& function) {
  std::ofstream("/proc/self/clear_refs") << "5";  // forget the largest so far
  const double before = status_mb("VmRSS");
  function();
  return status_mb("VmHWM") - before;
}

template <class Function>
double seconds(const Function& function) {
  const double start = now();
  function();
  return now() - start;
}

/// Starts dd as a program of its own and waits for it.
double dd_seconds(const std::string& path, std::size_t mb) {
  const std::string command = fmt::format("dd if=/dev/zero of='{}' bs=1M count={} conv=fsync 2>/dev/null", path, mb);
  return seconds([&] {
    if (std::system(command.c_str()) != 0) throw std::runtime_error("dd failed");
  });
}

/// Python, null where there is none.
std::unique_ptr<Program> start_python(std::size_t tensors, std::size_t elements) {
  auto python = std::make_unique<Program>(std::vector<std::string>{FABRIC_SOURCE_DIR "/tools/run-python",
                                                                   FABRIC_SOURCE_DIR "/bench/checkpoint/checkpoint.py",
                                                                   std::to_string(tensors), std::to_string(elements)});
  try {
    python->ask("ready");
    return python;
  } catch (const std::exception&) {
    fmt::print("without Python's torch.save and torch.load: tools/install-python makes their environment\n");
    return nullptr;
  }
}

void run(const Arguments& arguments) {
  const std::size_t tensors = 50;
  const std::size_t elements = (arguments.quick ? 50'000 : 2'500'000);
  const std::size_t bytes = tensors * elements * sizeof(float);
  const char* chosen = std::getenv("FABRIC_BENCH_FOLDER");
  const std::filesystem::path folder =
      std::filesystem::path(chosen == nullptr ? FABRIC_BINARY_DIR : chosen) / "bench_checkpoint";
  std::filesystem::create_directories(folder);
  const std::string path = folder / "ours.pt";

  at::set_num_threads(1);
  OnCpu fabric;
  std::map<std::string, std::reference_wrapper<at::Tensor>> state;
  std::vector<at::Tensor> values(tensors);
  for (std::size_t i = 0; i < tensors; ++i) {
    values[i] = torch::randn({static_cast<std::int64_t>(elements)});
    state.emplace("weight " + std::to_string(i), values[i]);
  }
  const auto python = start_python(tensors, elements);

  // Each round begins with another one, since a disk may tire of what came just before.
  enum Contestant { save, safetensors, background, dd, python_save, load, python_load, python_load_mmap, contestants };
  const auto measured = [&](int which, int round) -> double {
    switch (which) {
      case save: return seconds([&] { fabric.save(path, state); });
      case safetensors:
        return seconds([&] { fabric.save<fabric::SafetensorsFile>(folder / "ours.safetensors", state); });
      case background: {
        fabric::Checkpoints checkpoints(fabric, {.folder = folder / "async", .keep = 1, .asynchronous = true});
        const double blocked = seconds([&] { checkpoints.save(round, state); });
        checkpoints.close();
        return blocked;
      }
      case dd: return dd_seconds(folder / "dd", bytes >> 20U);
      case load: return seconds([&] { fabric.load(path, state); });
      default: break;
    }
    const char* command = which == python_save ? "save" : which == python_load ? "load" : "load_mmap";
    return std::stod(python->ask(std::string(command) + " " + path));
  };
  fabric.save(path, state);
  Samples times[contestants];
  const int rounds = arguments.quick ? 2 : contestants;
  for (int round = -1; round < rounds; ++round) {  // the first one warms up
    for (int turn = 0; turn < contestants; ++turn) {
      const int which = (round + 1 + turn * 3) % contestants;  // so that the saves do not follow each other
      if (python == nullptr && (which == python_save || which == python_load || which == python_load_mmap)) continue;
      const double time = measured(which, round + 1);
      if (round >= 0) times[which].add(time);
    }
  }

  Report report;
  const std::string size = fmt::format("{} MB", bytes / 1'000'000);
  report.add({"save " + size, "s", times[save], times[dd], "dd conv=fsync"});
  report.add({"save safetensors " + size, "s", times[safetensors], times[dd], "dd conv=fsync"});
  report.add({"asynchronous save, until it returns " + size, "s", times[background], times[dd], "dd conv=fsync"});
  if (python != nullptr) {
    report.add({"save " + size, "s", times[save], times[python_save], "Python torch.save and fsync"});
    report.add({"load " + size, "s", times[load], times[python_load], "Python torch.load and copy"});
    report.add({"load " + size, "s", times[load], times[python_load_mmap], "Python torch.load(mmap=True) and copy"});
  } else {
    report.add({"load " + size, "s", times[load], {}, ""});
  }
  const double mb = static_cast<double>(bytes) / 1e6;
  report.add(
      {"memory added by a save", "% of the state", {100 * added_mb([&] { fabric.save(path, state); }) / mb}, {}, ""});
  const double anonymous = status_mb("RssAnon");
  fabric.load(path, state);
  report.add({"memory left by a load", "% of the state", {100 * (status_mb("RssAnon") - anonymous) / mb}, {}, ""});
  fabric::Checkpoints checkpoints(fabric, {.folder = folder / "async", .keep = 1, .asynchronous = true});
  report.add({"memory added by an asynchronous save",
              "% of the state",
              {100 * added_mb([&] {
                 checkpoints.save(1, state);
                 checkpoints.close();
               }) /
               mb},
              {},
              ""});
  report.write(arguments.json);
  std::filesystem::remove_all(folder);
}

}  // namespace

int main(int argc, char** argv) try {
  run(parse(argc, argv));
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "checkpoint: {}\n", error.what());
  return 1;
}
