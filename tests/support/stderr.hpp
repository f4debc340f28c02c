// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdio>
#include <stdexcept>
#include <string>

#include <unistd.h>

namespace fabric::tests {

/// What this process writes to standard error while `function` runs.
template <class Function>
std::string stderr_of(Function&& function) {
  std::FILE* const file = std::tmpfile();
  if (file == nullptr) throw std::runtime_error("no temporary file");
  std::fflush(stderr);
  const int before = dup(STDERR_FILENO);
  dup2(fileno(file), STDERR_FILENO);
  const auto restore = [&] {
    std::fflush(stderr);
    dup2(before, STDERR_FILENO);
    close(before);
  };
  try {
    function();
  } catch (...) {
    restore();
    std::fclose(file);
    throw;
  }
  restore();
  std::string text;
  std::rewind(file);
  std::array<char, 4096> block{};
  while (const std::size_t n = std::fread(block.data(), 1, block.size(), file)) text.append(block.data(), n);
  std::fclose(file);
  return text;
}

}  // namespace fabric::tests
