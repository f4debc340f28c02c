// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <string>
#include <string_view>
#include <utility>

#include <torch/types.h>

#include "fabric/error.hpp"
#include "fabric/precision/quantisation.hpp"

namespace fabric::detail {

/// What the package writes about a quantised weight, as the bytes of a JSON object.
struct QuantState {
  quantisation::Code4 code = quantisation::Code4::nf4;
  at::ScalarType dtype = at::kFloat;  ///< Of the weight before.
  std::array<int64_t, 2> sizes{};     ///< (out, in)
  bool nested = false;                ///< The block maxima are in 8 bits.
  float offset = 0;                   ///< Their mean.

  [[nodiscard]] std::string kind() const { return code == quantisation::Code4::nf4 ? "nf4" : "fp4"; }
};

inline constexpr std::pair<at::ScalarType, std::string_view> quant_state_dtypes[] = {
    {at::kFloat, "float32"}, {at::kHalf, "float16"}, {at::kBFloat16, "bfloat16"}};

[[nodiscard]] inline at::Tensor to_bytes(const QuantState& state) {
  std::string dtype;
  for (const auto& [type, name] : quant_state_dtypes) {
    if (type == state.dtype) dtype = name;
  }
  std::string text = "{\"quant_type\": \"" + state.kind() +
                     "\", \"blocksize\": " + std::to_string(quantisation::block_size) + ", \"dtype\": \"" + dtype +
                     "\", \"shape\": [" + std::to_string(state.sizes[0]) + ", " + std::to_string(state.sizes[1]) + "]";
  if (state.nested) {
    std::array<char, 32> digits{};
    const double offset = state.offset;  // Python writes a double
    const char* const end = std::to_chars(digits.data(), digits.data() + digits.size(), offset).ptr;
    text += ", \"nested_blocksize\": " + std::to_string(quantisation::nested_block_size) +
            ", \"nested_dtype\": \"float32\", \"nested_offset\": " +
            std::string(digits.data(), static_cast<std::size_t>(end - digits.data()));
    text += "}" + std::string(digits.size() - static_cast<std::size_t>(end - digits.data()), ' ');
  } else {
    text += "}";
  }
  // Checkpoints of one model have tensors of one length, whatever the number above and the weight's dtype.
  constexpr std::size_t longest = std::string_view("bfloat16").size();
  text.append(longest - dtype.size(), ' ');
  at::Tensor bytes = at::empty({static_cast<int64_t>(text.size())}, at::kByte);
  std::memcpy(bytes.data_ptr(), text.data(), text.size());
  return bytes;
}

/// Throws fabric::Error, with `name` in it, for what cannot be read or is not supported.
[[nodiscard]] inline QuantState quant_state_of(const at::Tensor& bytes, const std::string& name) {
  const at::Tensor own = bytes.to(at::kCPU).contiguous();
  const std::string text(static_cast<const char*>(own.data_ptr()), static_cast<std::size_t>(own.numel()));
  const auto fail = [&](const std::string& what) -> void {
    throw Error("fabric: quantised weights: " + name + ": " + what + " in " + text);
  };
  // The object is flat: a value ends at a comma, a brace, or its own bracket or quote.
  const auto field = [&](const std::string& key) -> std::string {
    const std::size_t at = text.find("\"" + key + "\":");
    if (at == std::string::npos) return "";
    std::size_t begin = text.find_first_not_of(' ', at + key.size() + 3);
    if (begin == std::string::npos) return "";
    const char first = text[begin];
    const std::size_t end = first == '['   ? text.find(']', begin)
                            : first == '"' ? text.find('"', begin + 1)
                                           : text.find_first_of(",}", begin);
    begin += first == '[' || first == '"' ? 1 : 0;
    return end == std::string::npos ? "" : text.substr(begin, end - begin);
  };
  const auto number = [&](const std::string& digits, auto& value) {
    const std::size_t begin = std::min(digits.find_first_not_of(' '), digits.size());
    return std::from_chars(digits.data() + begin, digits.data() + digits.size(), value).ec == std::errc();
  };

  QuantState state;
  const std::string kind = field("quant_type");
  if (kind != "nf4" && kind != "fp4") fail("the quant_type is neither nf4 nor fp4");
  state.code = kind == "nf4" ? quantisation::Code4::nf4 : quantisation::Code4::fp4;
  int64_t size = 0;
  if (!number(field("blocksize"), size) || size != quantisation::block_size) fail("the blocksize is not 64");
  const std::string dtype = field("dtype");
  const auto* const known = std::find_if(std::begin(quant_state_dtypes), std::end(quant_state_dtypes),
                                         [&](const auto& entry) { return entry.second == dtype; });
  if (known == std::end(quant_state_dtypes)) fail("the dtype is not float32, float16 or bfloat16");
  state.dtype = known->first;
  const std::string shape = field("shape");
  const std::size_t comma = shape.find(',');
  if (comma == std::string::npos || !number(shape.substr(0, comma), state.sizes[0]) ||
      !number(shape.substr(comma + 1), state.sizes[1])) {
    fail("the shape has not two sizes");
  }
  if (const std::string nested = field("nested_blocksize"); !nested.empty()) {
    state.nested = true;
    if (!number(nested, size) || size != quantisation::nested_block_size) fail("the nested_blocksize is not 256");
    double offset = 0;
    if (!number(field("nested_offset"), offset)) fail("the nested_offset is no number");
    state.offset = static_cast<float>(offset);
  }
  return state;
}

}  // namespace fabric::detail
