// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <torch/torch.h>

#include "support/gzip.hpp"

namespace fabric::tests {

/// A file that a script of tests/reference wrote.
inline nlohmann::json stored(const std::string& name) {
  const auto lines = gunzip_lines(FABRIC_SOURCE_DIR "/tests/reference/" + name);
  if (lines.empty()) throw std::runtime_error("cannot read tests/reference/" + name);
  return nlohmann::json::parse(lines[0]);
}

/// A tensor from its dtype, its shape and its bytes in hexadecimal.
inline at::Tensor stored_tensor(const nlohmann::json& json) {
  static const std::map<std::string, at::ScalarType> types{{"float32", at::kFloat},     {"float16", at::kHalf},
                                                           {"bfloat16", at::kBFloat16}, {"uint8", at::kByte},
                                                           {"int8", at::kChar},         {"int64", at::kLong}};
  at::Tensor tensor =
      at::empty(json.at("shape").get<std::vector<std::int64_t>>(), types.at(json.at("dtype").get<std::string>()));
  const std::string digits = json.at("data");
  if (digits.size() != 2 * tensor.nbytes()) throw std::runtime_error("a stored tensor of another length");
  const auto value = [](char digit) { return digit <= '9' ? digit - '0' : digit - 'a' + 10; };
  auto* bytes = static_cast<unsigned char*>(tensor.data_ptr());
  for (std::size_t i = 0; i < tensor.nbytes(); ++i) {
    bytes[i] = static_cast<unsigned char>(16 * value(digits[2 * i]) + value(digits[2 * i + 1]));
  }
  return tensor;
}

/// True when this process has the settings of tests/reference/same_everywhere.py, under which LibTorch's sums are the
/// stored ones' to the last digit. Otherwise they differ in the last one, and what is rounded to 16 bits now and then
/// in the last of those.
inline bool same_kernels() {
  const char* const capability = std::getenv("ATEN_CPU_CAPABILITY");
  return capability != nullptr && std::string(capability) == "default";
}

}  // namespace fabric::tests
