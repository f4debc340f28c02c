// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <torch/torch.h>

#include "fabric/checkpoint/value.hpp"
#include "support/gzip.hpp"

namespace fabric::tests {

using Json = nlohmann::json;

/// A file of tests/reference, which a Python script there wrote.
inline Json read_reference(const std::string& name) {
  const auto lines = gunzip_lines(FABRIC_SOURCE_DIR "/tests/reference/" + name);
  if (lines.empty()) throw std::runtime_error("cannot read tests/reference/" + name);
  return Json::parse(lines[0]);
}

/// A tensor from its dtype, its shape and its bytes in hexadecimal; undefined for null.
inline at::Tensor tensor_of(const Json& json) {
  if (json.is_null()) return {};
  const std::string name = json["dtype"];
  const auto dtype = name == "float32"    ? at::kFloat
                     : name == "float64"  ? at::kDouble
                     : name == "bfloat16" ? at::kBFloat16
                     : name == "float16"  ? at::kHalf
                     : name == "int64"    ? at::kLong
                     : name == "int8"     ? at::kChar
                     : name == "uint8"    ? at::kByte
                                          : throw std::runtime_error("no dtype " + name);
  at::Tensor tensor = at::empty(json["shape"].get<std::vector<std::int64_t>>(), dtype);
  const std::string digits = json["data"];
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

inline std::vector<at::Tensor> tensors_of(const Json& list) {
  std::vector<at::Tensor> tensors;
  for (const Json& item : list) tensors.push_back(tensor_of(item));
  return tensors;
}

/// What Python had, as a checkpoint would hold it. A key of digits is a number, as in an optimizer's state.
inline Value value_of(const Json& json) {
  if (json.is_null()) return {};
  if (json.is_boolean()) return json.get<bool>();
  if (json.is_number_integer()) return json.get<std::int64_t>();
  if (json.is_number()) return json.get<double>();
  if (json.is_string()) return json.get<std::string>();
  if (json.is_object() && json.contains("data") && json.contains("dtype")) return tensor_of(json);
  if (json.is_array() || json.contains("tuple")) {
    List list{{}, !json.is_array()};
    for (const Json& item : json.is_array() ? json : json["tuple"]) list.items.push_back(value_of(item));
    return list;
  }
  Dict dict;
  for (const auto& [key, item] : json.items()) {
    const bool number = !key.empty() && key.find_first_not_of("0123456789") == std::string::npos;
    dict[number ? Dict::Key(std::int64_t{std::stoll(key)}) : Dict::Key(key)] = value_of(item);
  }
  return dict;
}

/// The largest distance between elements of two tensors, counted in representable numbers; infinite if dtypes, shapes
/// or NaNs differ.
inline double ulps_between(const at::Tensor& a, const at::Tensor& b) {
  constexpr double apart = std::numeric_limits<double>::infinity();
  if (!a.defined() || !b.defined()) return a.defined() == b.defined() ? 0 : apart;
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return apart;
  const auto whole = a.element_size() == 8 ? at::kLong : a.element_size() == 4 ? at::kInt : at::kShort;
  // Bits as integers are in the order of the numbers, but for the sign, which counts downwards.
  const auto ordered = [&](const at::Tensor& tensor) {
    const at::Tensor bits = tensor.detach().contiguous().reshape({-1}).view(whole).to(at::kLong);
    const std::int64_t zero = whole == at::kLong  ? std::numeric_limits<std::int64_t>::min()
                              : whole == at::kInt ? std::numeric_limits<std::int32_t>::min()
                                                  : std::numeric_limits<std::int16_t>::min();
    return at::where(bits.lt(0), zero - bits, bits);
  };
  const at::Tensor nan_a = a.detach().isnan().reshape({-1});
  if (!nan_a.equal(b.detach().isnan().reshape({-1}))) return apart;
  const at::Tensor distance = (ordered(a).to(at::kDouble) - ordered(b).to(at::kDouble)).abs().masked_fill(nan_a, 0);
  return distance.numel() == 0 ? 0 : distance.max().item<double>();
}

/// The largest distance between tensors or numbers of two trees; infinite if their keys, kinds or texts differ.
inline double ulps_between(const Value& a, const Value& b) {
  constexpr double apart = std::numeric_limits<double>::infinity();
  if (a.is<at::Tensor>() && b.is<at::Tensor>()) return ulps_between(a.as<at::Tensor>(""), b.as<at::Tensor>(""));
  if (a.is<Dict>() && b.is<Dict>()) {
    const Dict& ours = a.as<Dict>("");
    const Dict& theirs = b.as<Dict>("");
    double most = ours.size() == theirs.size() ? 0 : apart;
    for (const auto& [key, value] : ours) {
      const Value* other = theirs.find(key);
      if (other == nullptr) return apart;
      most = std::max(most, ulps_between(value, *other));
    }
    return most;
  }
  if (a.is<List>() && b.is<List>()) {
    const List& ours = a.as<List>("");
    const List& theirs = b.as<List>("");
    if (ours.items.size() != theirs.items.size() || ours.is_tuple != theirs.is_tuple) return apart;
    double most = 0;
    for (std::size_t i = 0; i < ours.items.size(); ++i) {
      most = std::max(most, ulps_between(ours.items[i], theirs.items[i]));
    }
    return most;
  }
  const auto is_number = [](const Value& value) { return value.is<double>() || value.is<std::int64_t>(); };
  if (is_number(a) && is_number(b)) return a.as_number("") == b.as_number("") ? 0 : apart;
  if (a.is<bool>() && b.is<bool>()) return a.as<bool>("") == b.as<bool>("") ? 0 : apart;
  if (a.is<std::string>() && b.is<std::string>()) return a.as<std::string>("") == b.as<std::string>("") ? 0 : apart;
  return a.is_none() && b.is_none() ? 0 : apart;
}

}  // namespace fabric::tests
