// SPDX-License-Identifier: Apache-2.0
//
// One `resolve` beside Lightning Fabric's `_Connector` on the same flags, in interleaved rounds of one run.
// Usage: bench_connector OUT.json [PYTHON]; without a Python that has lightning, ours alone.
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "fabric/connector/probe.hpp"
#include "fabric/connector/resolve.hpp"

namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

/// A case: the flags here and as keyword arguments there.
struct Case {
  const char* name;
  fabric::Flags flags;
  const char* arguments;
};

/// Python, which makes connectors on request: "N ARGUMENTS" in, nanoseconds a piece out.
class Lightning {
 public:
  explicit Lightning(const std::string& python) {
    constexpr const char* script = R"python(
import sys, time, warnings, logging
try:
    from lightning.fabric.connector import _Connector
except ImportError:
    from lightning_fabric.connector import _Connector
warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)
print("ready", flush=True)
for line in sys.stdin:
    count, arguments = line.split(" ", 1)
    arguments = eval(f"dict({arguments})")
    start = time.perf_counter_ns()
    for _ in range(int(count)):
        try:
            _Connector(**arguments)
        except ValueError:
            pass
    print((time.perf_counter_ns() - start) / int(count), flush=True)
)python";
    int to[2];
    int from[2];
    if (pipe(to) != 0 || pipe(from) != 0) return;
    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_adddup2(&files, to[0], 0);
    posix_spawn_file_actions_adddup2(&files, from[1], 1);
    for (const int fd : {to[0], to[1], from[0], from[1]}) posix_spawn_file_actions_addclose(&files, fd);
    const char* argv[]{python.c_str(), "-c", script, nullptr};
    const bool started = posix_spawnp(&child_, python.c_str(), &files, nullptr, const_cast<char**>(argv), environ) == 0;
    posix_spawn_file_actions_destroy(&files);
    close(to[0]);
    close(from[1]);
    to_ = fdopen(to[1], "w");
    from_ = fdopen(from[0], "r");
    if (!started) child_ = 0;
    ready_ = started && answer() == "ready";
  }
  Lightning(const Lightning&) = delete;
  Lightning& operator=(const Lightning&) = delete;
  ~Lightning() {
    if (to_ != nullptr) std::fclose(to_);
    if (from_ != nullptr) std::fclose(from_);
    if (child_ != 0) waitpid(child_, nullptr, 0);
  }

  [[nodiscard]] bool ready() const { return ready_; }
  double nanoseconds(int count, const char* arguments) {
    fmt::print(to_, "{} {}\n", count, arguments);
    std::fflush(to_);
    return std::stod(answer());
  }

 private:
  std::string answer() {
    char line[256];
    if (std::fgets(line, sizeof line, from_) == nullptr) return {};
    std::string text(line);
    while (!text.empty() && text.back() == '\n') text.pop_back();
    return text;
  }

  pid_t child_ = 0;
  std::FILE* to_ = nullptr;
  std::FILE* from_ = nullptr;
  bool ready_ = false;
};

template <class Fn>
double nanoseconds(int count, Fn&& fn) {
  const auto start = Clock::now();
  for (int i = 0; i < count; ++i) fn();
  return std::chrono::duration<double, std::nano>(Clock::now() - start).count() / count;
}

double median(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

Json spread(const std::vector<double>& times) {
  const auto [least, most] = std::minmax_element(times.begin(), times.end());
  return {*least, *most};
}

std::string machine() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("model name"))
      return fmt::format("{}, {} cores", line.substr(line.find(':') + 2), sysconf(_SC_NPROCESSORS_ONLN));
  }
  return "unknown";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    fmt::print(stderr, "usage: {} OUT.json [PYTHON]\n", argv[0]);
    return 2;
  }
  const std::string own = "third_party/python/bin/python";
  const std::string python = argc > 2 ? argv[2] : access(own.c_str(), X_OK) == 0 ? own : "";
  Lightning lightning(python.empty() ? "/bin/false" : python);

  const std::vector<Case> cases{
      {"defaults", {.accelerator = "cpu"}, "accelerator='cpu'"},
      {"ddp, 2 devices, bf16-mixed",
       {.accelerator = "cpu", .strategy = "ddp", .devices = 2, .precision = "bf16-mixed"},
       "accelerator='cpu', strategy='ddp', devices=2, precision='bf16-mixed'"},
      {"devices as text",
       {.accelerator = "cpu", .strategy = "ddp_spawn", .devices = "4", .precision = "64-true"},
       "accelerator='cpu', strategy='ddp_spawn', devices='4', precision='64-true'"},
      {"an unknown strategy", {.accelerator = "cpu", .strategy = "dpp"}, "accelerator='cpu', strategy='dpp'"}};

  const fabric::CapturedVariables captured = fabric::capture_variables();
  const fabric::ProbedHost host = fabric::probe_host(captured);
  volatile int sink = 0;
  Json rows = Json::array();
  fmt::print("{:<58}{:>14}{:>14}{:>9}\n", "ns per resolve", "ours", "lightning", "ratio");
  for (const bool capture : {false, true}) {
    for (const Case& one : cases) {
      // What theirs does each time too: reading the environment. Host facts are asked for once here, each time there.
      const auto resolve = [&] {
        const fabric::Resolution resolution = capture ? fabric::resolve(one.flags, fabric::capture_variables(), host)
                                                      : fabric::resolve(one.flags, captured, host);
        sink = sink + resolution.devices.count;
      };
      std::vector<double> ours;
      std::vector<double> theirs;
      for (int round = 0; round < 9; ++round) {
        ours.push_back(nanoseconds(20000, resolve));
        if (lightning.ready()) theirs.push_back(lightning.nanoseconds(300, one.arguments));
      }
      Json row{{"name", std::string(one.name) + (capture ? ", variables captured each time" : "")},
               {"unit", "ns/resolve"},
               {"ours", median(ours)},
               {"ours_spread", spread(ours)}};
      row["baseline"] = theirs.empty() ? Json() : Json(median(theirs));
      if (!theirs.empty()) row["baseline_spread"] = spread(theirs);
      row["baseline_name"] = "Lightning Fabric _Connector";
      row["ratio"] = theirs.empty() ? Json() : Json(median(ours) / median(theirs));
      fmt::print("{:<58}{:>14.0f}{:>14}{:>9}\n", row["name"].get<std::string>(), median(ours),
                 theirs.empty() ? "-" : fmt::format("{:.0f}", median(theirs)),
                 theirs.empty() ? "-" : fmt::format("{:.4f}", median(ours) / median(theirs)));
      rows.push_back(row);
    }
  }
  if (!lightning.ready())
    fmt::print("no Python with lightning: tools/install-python makes one, or name one as PYTHON\n");
  std::ofstream(argv[1]) << Json{{"machine", machine()}, {"rows", rows}}.dump(2) << "\n";
  return 0;
}
