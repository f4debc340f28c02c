// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/types.h>

#include "fabric/error.hpp"

namespace fabric::detail {

/// How a value of a type travels from one process to another; specialised for those that can. `put` appends its bytes,
/// `get` takes them off again.
template <class T>
struct Travel;

/// What `launch(function)` can bring back from a process that it started: numbers, texts, tensors, and vectors, pairs,
/// tuples and optionals of these.
template <class T>
concept CanTravel = requires(std::string& bytes, std::string_view& rest, const T& value) {
  Travel<T>::put(bytes, value);
  { Travel<T>::get(rest) } -> std::same_as<T>;
};

inline std::string_view take(std::string_view& bytes, std::size_t count) {
  if (bytes.size() < count) throw Error("fabric: launch: the result of rank 0 is incomplete");
  const std::string_view taken = bytes.substr(0, count);
  bytes.remove_prefix(count);
  return taken;
}

template <class T>
requires(std::is_arithmetic_v<T> || std::is_enum_v<T>) struct Travel<T> {
  static void put(std::string& bytes, const T& value) {
    bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  static T get(std::string_view& bytes) {
    T value;
    std::memcpy(&value, take(bytes, sizeof value).data(), sizeof value);
    return value;
  }
};

template <>
struct Travel<std::string> {
  static void put(std::string& bytes, const std::string& value) {
    Travel<std::size_t>::put(bytes, value.size());
    bytes += value;
  }
  static std::string get(std::string_view& bytes) {
    const auto size = Travel<std::size_t>::get(bytes);
    return std::string(take(bytes, size));
  }
};

template <CanTravel T>
struct Travel<std::vector<T>> {
  static void put(std::string& bytes, const std::vector<T>& values) {
    Travel<std::size_t>::put(bytes, values.size());
    for (const T& value : values) Travel<T>::put(bytes, value);
  }
  static std::vector<T> get(std::string_view& bytes) {
    std::vector<T> values;
    for (auto left = Travel<std::size_t>::get(bytes); left > 0; --left) values.push_back(Travel<T>::get(bytes));
    return values;
  }
};

template <CanTravel T>
struct Travel<std::optional<T>> {
  static void put(std::string& bytes, const std::optional<T>& value) {
    Travel<bool>::put(bytes, value.has_value());
    if (value) Travel<T>::put(bytes, *value);
  }
  static std::optional<T> get(std::string_view& bytes) {
    if (!Travel<bool>::get(bytes)) return std::nullopt;
    return Travel<T>::get(bytes);
  }
};

template <CanTravel... Ts>
struct Travel<std::tuple<Ts...>> {
  static void put(std::string& bytes, const std::tuple<Ts...>& values) {
    std::apply([&](const Ts&... each) { (Travel<Ts>::put(bytes, each), ...); }, values);
  }
  static std::tuple<Ts...> get(std::string_view& bytes) {
    return std::tuple<Ts...>{Travel<Ts>::get(bytes)...};  // braces: from left to right
  }
};

template <CanTravel A, CanTravel B>
struct Travel<std::pair<A, B>> {
  static void put(std::string& bytes, const std::pair<A, B>& value) {
    Travel<A>::put(bytes, value.first);
    Travel<B>::put(bytes, value.second);
  }
  static std::pair<A, B> get(std::string_view& bytes) {
    return std::pair<A, B>{Travel<A>::get(bytes), Travel<B>::get(bytes)};
  }
};

/// A tensor arrives on the CPU, with its values, shape and dtype.
template <>
struct Travel<at::Tensor> {
  static void put(std::string& bytes, const at::Tensor& tensor) {
    Travel<bool>::put(bytes, tensor.defined());
    if (!tensor.defined()) return;
    const at::Tensor here = tensor.detach().cpu().contiguous();
    Travel<c10::ScalarType>::put(bytes, here.scalar_type());
    Travel<std::vector<std::int64_t>>::put(bytes, here.sizes().vec());
    bytes.append(static_cast<const char*>(here.data_ptr()), here.nbytes());
  }
  static at::Tensor get(std::string_view& bytes) {
    if (!Travel<bool>::get(bytes)) return {};
    const auto type = Travel<c10::ScalarType>::get(bytes);
    at::Tensor tensor = at::empty(Travel<std::vector<std::int64_t>>::get(bytes), type);
    std::memcpy(tensor.data_ptr(), take(bytes, tensor.nbytes()).data(), tensor.nbytes());
    return tensor;
  }
};

}  // namespace fabric::detail
