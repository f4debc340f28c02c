// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

/// One input of a fuzz target: libFuzzer calls it with inputs that it makes up, replay.cpp with those that are kept.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace fabric::fuzz {

/// An input, taken apart from the front.
struct Input {
  std::string_view rest;

  Input(const std::uint8_t* data, std::size_t size) : rest(reinterpret_cast<const char*>(data), size) {}

  unsigned char byte() {
    if (rest.empty()) return 0;
    const auto first = static_cast<unsigned char>(rest[0]);
    rest.remove_prefix(1);
    return first;
  }
  std::string_view line() {
    const std::size_t end = rest.find('\n');
    const std::string_view text = rest.substr(0, end);
    rest.remove_prefix(end == std::string_view::npos ? rest.size() : end + 1);
    return text;
  }
};

/// What must hold for every input.
inline void require(bool holds) {
  if (!holds) std::abort();
}

}  // namespace fabric::fuzz
