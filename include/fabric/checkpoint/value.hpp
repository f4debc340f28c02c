// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include <ATen/core/Tensor.h>

#include "fabric/error.hpp"

namespace fabric {

class Value;

/// A list, or one of Python's tuples, of values.
struct List {
  std::vector<Value> items;
  bool is_tuple = false;
};

/// Keys with values, in the order in which they were added. A key is a text or, as in an optimizer's state, a number.
class Dict {
 public:
  using Key = std::variant<std::string, std::int64_t>;

  Dict() = default;
  Dict(std::initializer_list<std::pair<Key, Value>> entries);

  /// The value of `key`, added if it is not there.
  Value& operator[](const Key& key);
  /// Throws fabric::Error that names the key and those that are there.
  [[nodiscard]] const Value& at(const Key& key) const;
  /// Null if there is no such key.
  [[nodiscard]] const Value* find(const Key& key) const;
  [[nodiscard]] Value* find(const Key& key);

  [[nodiscard]] std::size_t size() const;
  [[nodiscard]] auto begin() const { return entries_.begin(); }
  [[nodiscard]] auto end() const { return entries_.end(); }
  [[nodiscard]] auto begin() { return entries_.begin(); }
  [[nodiscard]] auto end() { return entries_.end(); }

 private:
  void remember_places();

  std::vector<std::pair<Key, Value>> entries_;
  std::unordered_map<Key, std::size_t> places_;  // of a dict that is too long to search
};

/// How a message names a key.
[[nodiscard]] inline std::string to_text(const Dict::Key& key) {
  return std::holds_alternative<std::string>(key) ? std::get<std::string>(key)
                                                  : std::to_string(std::get<std::int64_t>(key));
}

/// What a checkpoint is made of: a tree of tensors, numbers and texts in the shape that Python's `state_dict`s have.
/// An object takes part in checkpoints by two members, as in Python: `Value state_dict() const` and
/// `void load_state_dict(const Value&)`.
class Value {
 public:
  using Data = std::variant<std::monostate, bool, std::int64_t, double, std::string, at::Tensor, List, Dict>;

  Value() = default;                   ///< Python's None.
  Value(bool value) : data_(value) {}  // NOLINT(google-explicit-constructor): a tree of values is written as literals
  template <class Number>
  requires(std::is_integral_v<Number> && !std::is_same_v<Number, bool>) Value(Number value)
      : data_(static_cast<std::int64_t>(value)) {}         // NOLINT(google-explicit-constructor)
  Value(double value) : data_(value) {}                    // NOLINT(google-explicit-constructor)
  Value(std::string value) : data_(std::move(value)) {}    // NOLINT(google-explicit-constructor)
  Value(const char* value) : data_(std::string(value)) {}  // NOLINT(google-explicit-constructor)
  Value(at::Tensor value) : data_(std::move(value)) {}     // NOLINT(google-explicit-constructor)
  Value(List value) : data_(std::move(value)) {}           // NOLINT(google-explicit-constructor)
  Value(Dict value) : data_(std::move(value)) {}           // NOLINT(google-explicit-constructor)

  [[nodiscard]] const Data& data() const { return data_; }
  [[nodiscard]] Data& data() { return data_; }
  template <class T>
  [[nodiscard]] bool is() const {
    return std::holds_alternative<T>(data_);
  }
  [[nodiscard]] bool is_none() const { return is<std::monostate>(); }
  /// Throws fabric::Error, with `what` in front, if the value is of another kind.
  template <class T>
  [[nodiscard]] const T& as(std::string_view what) const {
    if (const T* value = std::get_if<T>(&data_)) return *value;
    throw Error("fabric: " + std::string(what) + " is " + std::string(kind()) + ", not " +
                std::string(Value(T{}).kind()));
  }
  /// An integer, a double or a bool as a double.
  [[nodiscard]] double as_number(std::string_view what) const {
    if (const auto* integer = std::get_if<std::int64_t>(&data_)) return static_cast<double>(*integer);
    if (const auto* flag = std::get_if<bool>(&data_)) return *flag ? 1 : 0;
    return as<double>(what);
  }
  /// "a tensor", "a text", ...
  [[nodiscard]] std::string_view kind() const {
    constexpr std::string_view kinds[] = {"nothing", "a bool",   "an integer", "a float",
                                          "a text",  "a tensor", "a list",     "a dict"};
    return kinds[data_.index()];
  }

 private:
  Data data_;
};

/// A base for objects whose type is known only at run time, such as an optimizer behind a pointer to
/// `torch::optim::Optimizer`. Others need no base to take part in checkpoints: the two members are enough.
class Stateful {
 public:
  [[nodiscard]] virtual Value state_dict() const = 0;
  /// Checks everything before it changes anything; throws fabric::Error.
  virtual void load_state_dict(const Value& state) = 0;

 protected:
  ~Stateful() = default;
};

inline Dict::Dict(std::initializer_list<std::pair<Key, Value>> entries) : entries_(entries) { remember_places(); }

inline std::size_t Dict::size() const { return entries_.size(); }

inline void Dict::remember_places() {
  constexpr std::size_t searched = 16;  // up to here looking is faster than hashing
  if (entries_.size() <= searched) return;
  for (std::size_t i = places_.size(); i < entries_.size(); ++i) places_.emplace(entries_[i].first, i);
}

inline Value* Dict::find(const Key& key) {
  if (!places_.empty()) {
    const auto place = places_.find(key);
    return place == places_.end() ? nullptr : &entries_[place->second].second;
  }
  for (auto& [own, value] : entries_) {
    if (own == key) return &value;
  }
  return nullptr;
}
inline const Value* Dict::find(const Key& key) const { return const_cast<Dict*>(this)->find(key); }

inline Value& Dict::operator[](const Key& key) {
  if (Value* value = find(key)) return *value;
  // In place: g++ 12 takes moving an empty variant for a read of what is in none of its alternatives.
  entries_.emplace_back(std::piecewise_construct, std::tuple(key), std::tuple<>());
  remember_places();
  return entries_.back().second;
}

inline const Value& Dict::at(const Key& key) const {
  if (const Value* value = find(key)) return *value;
  std::string there;
  for (const auto& [own, value] : entries_) there += (there.empty() ? "" : ", ") + to_text(own);
  throw Error("fabric: there is no '" + to_text(key) + "'; there are: " + (there.empty() ? "none" : there));
}

}  // namespace fabric
