// SPDX-License-Identifier: Apache-2.0
//
// Measures every entry of a menu on the same loop:
//   sweep --steps 200 --rounds 5 --only Ddp --json sweep.json
// Each measurement is a process of its own, so that no entry finds the threads, caches or process group of another; a
// parallel entry starts its other ranks itself. The rounds go through the whole menu, so that what else the machine
// does meets all entries alike.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <boost/hana/for_each.hpp>
#include <fabric/connector/resolve_here.hpp>
#include <fcntl.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include "menu.hpp"

namespace {

using Json = nlohmann::ordered_json;

struct Entry {
  std::string name;
  Result (*measure)(const Settings&);
  std::vector<double> microseconds{};
  Json last{};
};

std::vector<Entry> entries_of_menu() {
  std::vector<Entry> entries;
  boost::hana::for_each(SweepMenu::entries, [&](auto entry) {
    using F = typename decltype(entry)::type;
    entries.push_back({fabric::name_of(fabric::PoliciesOf<F>::combination), &measure<F>});
  });
  return entries;
}

/// Runs this program again with more arguments and returns what it prints.
std::string run_again(std::vector<std::string> arguments) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error("cannot make a pipe");
  std::vector<char*> pointers;
  pointers.reserve(arguments.size() + 1);
  for (std::string& argument : arguments) pointers.push_back(argument.data());
  pointers.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  pid_t child = -1;
  const int error = posix_spawn(&child, "/proc/self/exe", &actions, nullptr, pointers.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  std::string output;
  char buffer[512];
  for (ssize_t n = 0; error == 0 && (n = read(ends[0], buffer, sizeof buffer)) > 0;) {
    output.append(buffer, static_cast<std::size_t>(n));
  }
  close(ends[0]);
  int status = 0;
  if (error != 0 || waitpid(child, &status, 0) != child || status != 0) {
    throw std::runtime_error("its process failed; " + output);
  }
  return output;
}

/// What a process of one entry does: measures, and prints the result as JSON.
void run_entry(const Entry& entry, const Settings& settings) {
  const Result result = entry.measure(settings);
  if (!result.reports) return;
  fmt::print("{}\n",
             Json{{"processes", result.processes}, {"us_per_step", result.microseconds}, {"loss", result.loss}}.dump());
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

/// Prints an entry's line of the table and returns the same as JSON.
Json report(const Entry& entry, const Settings& settings) {
  const double middle = median(entry.microseconds);
  const auto [least, most] = std::minmax_element(entry.microseconds.begin(), entry.microseconds.end());
  const int processes = entry.last["processes"];
  const double rows_per_second = 1e6 / middle * settings.batch_size * processes;
  fmt::print("{:<40} {:>9} {:>10.0f} {:>10.0f} {:>10.0f} {:>12.0f} {:>9.5f}\n", entry.name, processes, middle, *least,
             *most, rows_per_second, entry.last["loss"].get<double>());
  return {{"name", entry.name},     {"unit", "us/step"},
          {"median", middle},       {"least", *least},
          {"most", *most},          {"rows_per_second", rows_per_second},
          {"processes", processes}, {"loss", entry.last["loss"]}};
}

}  // namespace

int main(int argc, char** argv) try {
  Settings settings;
  int rounds = 3;
  std::string json;
  std::string only;
  std::string own_entry;
  CLI::App app("Measures every entry of a menu on the same loop");
  app.add_option("--steps", settings.steps, "of each measurement")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--rounds", rounds, "measurements of each entry")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--layers", settings.layers)->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--width", settings.width)->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--batch-size", settings.batch_size, "of each process")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--devices", settings.devices, "processes of a parallel strategy")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--json", json, "file for the results");
  app.add_option("--only", only, "entries with this in their name");
  app.add_option("--entry", own_entry, "measure this one here and print the result as JSON");
  CLI11_PARSE(app, argc, argv);

  std::vector<Entry> entries = entries_of_menu();
  const auto dropped = [&](const Entry& entry) {
    return own_entry.empty() ? entry.name.find(only) == std::string::npos : entry.name != own_entry;
  };
  std::string names;
  for (const Entry& entry : entries) names += "\n  " + entry.name;
  entries.erase(std::remove_if(entries.begin(), entries.end(), dropped), entries.end());
  if (entries.empty()) throw std::runtime_error("no such entry in the menu:" + names);
  if (!own_entry.empty()) {
    run_entry(entries.front(), settings);
    return 0;
  }

  const std::vector<std::string> arguments(argv, argv + argc);
  for (int round = 0; round < rounds; ++round) {
    for (Entry& entry : entries) {
      std::vector<std::string> command = arguments;
      command.insert(command.end(), {"--entry", entry.name});
      try {
        entry.last = Json::parse(run_again(command));
      } catch (const std::exception& error) {
        throw std::runtime_error(entry.name + ": " + error.what());
      }
      entry.microseconds.push_back(entry.last["us_per_step"]);
    }
  }
  fmt::print("{:<40} {:>9} {:>10} {:>10} {:>10} {:>12} {:>9}\n", "", "processes", "us/step", "least", "most", "rows/s",
             "loss");
  Json rows = Json::array();
  for (const Entry& entry : entries) rows.push_back(report(entry, settings));
  if (!json.empty()) {
    std::ofstream file(json);
    file << Json{{"steps", settings.steps}, {"rounds", rounds}, {"rows", rows}}.dump(2) << '\n';
    if (!file.flush()) throw std::runtime_error("cannot write " + json);
  }
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "sweep: {}\n", error.what());
  return 1;
}
