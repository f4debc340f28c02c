// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

namespace bench {

/// One number a round.
class Samples {
 public:
  Samples() = default;
  Samples(std::initializer_list<double> values) : values_(values) {}

  void add(double value) { values_.push_back(value); }
  [[nodiscard]] bool empty() const { return values_.empty(); }
  [[nodiscard]] double median() const {
    std::vector<double> sorted = values_;
    std::sort(sorted.begin(), sorted.end());
    const std::size_t half = sorted.size() / 2;
    return sorted.size() % 2 == 1 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
  }
  [[nodiscard]] double least() const { return *std::min_element(values_.begin(), values_.end()); }
  [[nodiscard]] double most() const { return *std::max_element(values_.begin(), values_.end()); }
  [[nodiscard]] std::size_t rounds() const { return values_.size(); }

 private:
  std::vector<double> values_;
};

/// Ours beside a baseline, measured in the same rounds. Without a baseline the row says what ours costs.
struct Row {
  std::string name;
  std::string unit;
  Samples ours;
  Samples baseline;
  std::string baseline_name;
};

/// The processor and the number of its cores.
[[nodiscard]] inline std::string machine() {
  std::string model = "unknown processor";
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("model name")) continue;
    model = line.substr(line.find(':') + 2);
    break;
  }
  return fmt::format("{}, {} cores", model, sysconf(_SC_NPROCESSORS_ONLN));
}

/// The table of a benchmark: printed row by row as it grows, then written as JSON.
class Report {
 public:
  void add(const Row& row) {
    using Json = nlohmann::ordered_json;
    if (rows_.empty()) {
      fmt::print("{:<40} {:<20} {:>24} {:>24} {:>7}  {}\n", "", "", "ours", "baseline", "ratio", "baseline is");
    }
    Json json{{"name", row.name}, {"unit", row.unit}, {"ours", row.ours.median()}, {"baseline", nullptr}};
    json["baseline_name"] = row.baseline_name;
    json["ratio"] = nullptr;
    json["rounds"] = row.ours.rounds();
    json["ours_spread"] = {row.ours.least(), row.ours.most()};
    std::string ratio;
    if (!row.baseline.empty()) {
      json["baseline"] = row.baseline.median();
      json["ratio"] = row.ours.median() / row.baseline.median();
      json["baseline_spread"] = {row.baseline.least(), row.baseline.most()};
      ratio = fmt::format("{:.4f}", json["ratio"].get<double>());
    }
    fmt::print("{:<40} {:<20} {:>24} {:>24} {:>7}  {}\n", row.name, row.unit, shown(row.ours), shown(row.baseline),
               ratio, row.baseline_name);
    std::fflush(stdout);
    rows_.push_back(std::move(json));
  }

  /// Throws std::runtime_error when the file cannot be written.
  void write(const std::filesystem::path& path) const {
    std::ofstream file(path);
    file << nlohmann::ordered_json{{"machine", machine()}, {"rows", rows_}}.dump(2) << '\n';
    if (!file.flush()) throw std::runtime_error("cannot write " + path.string());
  }

 private:
  /// The median, and how far the rounds lie apart.
  static std::string shown(const Samples& samples) {
    if (samples.empty()) return "-";
    if (samples.rounds() == 1) return number(samples.median());
    return fmt::format("{} ({}-{})", number(samples.median()), number(samples.least()), number(samples.most()));
  }
  static std::string number(double value) {
    return value < 100 ? fmt::format("{:.3g}", value) : fmt::format("{:.0f}", value);
  }

  nlohmann::ordered_json rows_ = nlohmann::ordered_json::array();
};

/// A benchmark's command line: `bench_name OUT.json [--quick]`.
struct Arguments {
  std::filesystem::path json;
  bool quick = false;  ///< Few steps and rounds: shows that it works, not how fast.
};

/// Throws std::runtime_error that says the usage.
[[nodiscard]] inline Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    if (std::string_view(argv[i]) == "--quick") {
      arguments.quick = true;
    } else if (argv[i][0] != '-' && arguments.json.empty()) {
      arguments.json = argv[i];
    } else {
      throw std::runtime_error(fmt::format("unknown argument '{}'; usage: {} OUT.json [--quick]", argv[i], argv[0]));
    }
  }
  if (arguments.json.empty()) throw std::runtime_error(fmt::format("usage: {} OUT.json [--quick]", argv[0]));
  return arguments;
}

}  // namespace bench
