// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace fabric::tests {

/// The lines of a gzip file, by way of the gzip program.
inline std::vector<std::string> gunzip_lines(const std::string& path) {
  const auto close = [](std::FILE* pipe) { pclose(pipe); };
  const std::unique_ptr<std::FILE, decltype(close)> pipe(popen(("gzip -dc '" + path + "'").c_str(), "r"), close);
  if (!pipe) throw std::runtime_error("cannot run gzip");
  std::string text;
  char block[65536];
  while (const std::size_t n = std::fread(block, 1, sizeof block, pipe.get())) text.append(block, n);
  std::vector<std::string> lines;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    lines.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return lines;
}

}  // namespace fabric::tests
