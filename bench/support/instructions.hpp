// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <unistd.h>

#include "support/program.hpp"

namespace bench {

/// Throws std::runtime_error unless valgrind, which counts instructions, is installed.
inline void require_valgrind() {
  if (std::system("valgrind --version > /dev/null 2>&1") == 0) return;
  throw std::runtime_error("valgrind, which counts instructions, is not installed");
}

/// This program with these variables and arguments, behind `tool`.
inline std::vector<std::string> this_program(const std::vector<std::string>& variables,
                                             const std::vector<std::string>& tool,
                                             const std::vector<std::string>& arguments) {
  std::vector<std::string> command{"env"};
  command.insert(command.end(), variables.begin(), variables.end());
  command.insert(command.end(), tool.begin(), tool.end());
  command.push_back(std::filesystem::read_symlink("/proc/self/exe").string());
  command.insert(command.end(), arguments.begin(), arguments.end());
  return command;
}

/// What this program executes, all its threads together, when it is called so.
inline double instructions(const std::vector<std::string>& variables, const std::vector<std::string>& arguments) {
  const auto path = std::filesystem::temp_directory_path() / fmt::format("bench.{}.callgrind", getpid());
  Program(this_program(variables, {"valgrind", "--tool=callgrind", "--quiet", "--callgrind-out-file=" + path.string()},
                       arguments))
      .wait();
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("totals: ")) continue;
    std::filesystem::remove(path);
    return std::stod(line.substr(line.find(' ')));
  }
  throw std::runtime_error("callgrind left no total in " + path.string());
}

/// Of what `count(steps)` counts, per step: the difference of two runs, since what comes before the first step is the
/// same in both.
template <class Count>
double per_step(const Count& count, int steps) {
  constexpr int few = 10;
  return (count(few + steps) - count(few)) / steps;
}

}  // namespace bench
