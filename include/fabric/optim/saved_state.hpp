// SPDX-License-Identifier: Apache-2.0
#pragma once

// How options and state of an optimizer look in Python's `state_dict()`, written and read.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/types.h>

#include "fabric/checkpoint/value.hpp"
#include "fabric/error.hpp"
#include "fabric/optim/bucket.hpp"
#include "fabric/optim/options.hpp"

namespace fabric::optim::detail {

inline std::string parameter_name(std::size_t place) { return "parameter " + std::to_string(place); }

/// What is wrong with a state that is being loaded, all of it.
class Problems {
 public:
  explicit Problems(std::string optimizer) : optimizer_(std::move(optimizer)) {}

  void add(const std::string& problem) { text_ += "\n  " + problem; }
  void throw_if_any() const {
    if (text_.empty()) return;
    throw Error("fabric: " + optimizer_ +
                "::load_state_dict: this state does not fit, and nothing was changed:" + text_);
  }

  const Dict* dict(const Value& value, const std::string& what) { return as<Dict>(value, what); }
  const Dict* dict(const Dict& parent, const char* key) { return child<Dict>(parent, key); }
  const List* list(const Dict& parent, const char* key, const std::string& where = {}) {
    return child<List>(parent, key, where);
  }
  template <class T>
  const T* as(const Value& value, const std::string& what) {
    if (value.is<T>()) return &value.as<T>("");
    add(what + " is " + std::string(value.kind()) + ", not " + std::string(Value(T()).kind()));
    return nullptr;
  }
  /// Entries of `state` that belong to none of the parameters.
  void add_strangers(const Dict& state, const std::vector<Dict::Key>& known) {
    for (const auto& [key, value] : state) {
      if (std::find(known.begin(), known.end(), key) != known.end()) continue;
      const auto* number = std::get_if<std::int64_t>(&key);
      add("the state of '" + (number ? std::to_string(*number) : std::get<std::string>(key)) +
          "', which is in no parameter group");
    }
  }

 private:
  template <class T>
  const T* child(const Dict& parent, const char* key, const std::string& where = {}) {
    if (const Value* value = parent.find(key)) return as<T>(*value, where + "'" + key + "'");
    add(where + "'" + key + "' is missing");
    return nullptr;
  }

  std::string optimizer_;
  std::string text_;
};

/// What is wrong with these options, each problem on a line of its own. `group` is what they were read from.
template <class Method>
std::string problems_of(const typename Method::Options& options, const Dict& group) {
  CheckOption check;
  each_option(options, check);
  const std::string another = Method::problem(options, group);
  return check.problems + (another.empty() ? "" : "\n  " + another);
}

/// Puts options into a dict.
struct WriteOption {
  void operator()(const char* name, double value) { group[name] = value; }
  void operator()(const char* name, bool value) { group[name] = value; }
  void operator()(const char* name, const std::tuple<double, double>& pair) {
    group[name] = List{{std::get<0>(pair), std::get<1>(pair)}, true};
  }
  Dict group{};
};

/// Takes options out of a dict. Python's older versions did not write all flags: those are false then.
struct ReadOption {
  const Dict& group;
  const std::string& where;
  Problems& problems;
  std::vector<Dict::Key> read{};

  void operator()(const char* name, double& value) {
    if (const Value* saved = find(name)) {
      number(*saved, name, value);
    } else {
      missing(name);
    }
  }
  void operator()(const char* name, bool& value) {
    const Value* saved = find(name);
    const bool* flag = saved == nullptr ? nullptr : problems.as<bool>(*saved, where + "'" + name + "'");
    value = flag != nullptr && *flag;
  }
  void operator()(const char* name, std::tuple<double, double>& pair) {
    const Value* saved = find(name);
    if (saved == nullptr) return missing(name);
    const List* list = problems.as<List>(*saved, where + "'" + name + "'");
    if (list == nullptr) return;
    if (list->items.size() != 2) {
      problems.add(where + "'" + name + "' has " + std::to_string(list->items.size()) + " numbers, not 2");
      return;
    }
    number(list->items[0], name, std::get<0>(pair));
    number(list->items[1], name, std::get<1>(pair));
  }

 private:
  const Value* find(const char* name) { return group.find(read.emplace_back(name)); }
  void missing(const char* name) { problems.add(where + "'" + name + "' is missing"); }
  /// A number, or a tensor of one element, as Python allows for `lr`.
  void number(const Value& saved, const char* name, double& value) {
    if (saved.is<at::Tensor>() && saved.as<at::Tensor>("").numel() == 1) {
      value = saved.as<at::Tensor>("").item<double>();
    } else if (saved.is<std::int64_t>() || saved.is<double>()) {
      value = saved.as_number("");
    } else {
      problems.add(where + "'" + name + "' is " + std::string(saved.kind()) + ", not a number");
    }
  }
};

template <class Method>
Dict saved_options(const typename Method::Options& options, bool maximize) {
  WriteOption write;
  each_option(options, write);
  write("maximize", maximize);
  for (const auto& [key, value] : Method::python_only()) write.group[key] = value;
  return std::move(write.group);
}

/// One of `param_groups`, read.
template <class Options>
struct SavedGroup {
  Options options;
  bool maximize = false;
  std::vector<std::int64_t> params{};  // what the parameters are called in `state`, in their order
  Dict more{};                         // entries that are no options
};

/// Reads a group that is to have `count` parameters; what it does not say stays as in `now`.
template <class Method>
SavedGroup<typename Method::Options> read_group(const Value& value, std::size_t index,
                                                const typename Method::Options& now, std::size_t count,
                                                Problems& problems) {
  SavedGroup<typename Method::Options> saved{now};
  const std::string where = "in group " + std::to_string(index) + ", ";
  const Dict* group = problems.dict(value, "group " + std::to_string(index));
  if (group == nullptr) return saved;
  ReadOption read{*group, where, problems};
  each_option(saved.options, read);
  read("maximize", saved.maximize);
  const std::string wrong = problems_of<Method>(saved.options, *group);
  if (!wrong.empty()) problems.add(where + "options out of range:" + wrong);
  const Dict python_only = Method::python_only();
  for (const auto& [key, entry] : *group) {
    const bool is_option = std::find(read.read.begin(), read.read.end(), key) != read.read.end();
    if (!is_option && key != Dict::Key("params") && python_only.find(key) == nullptr) saved.more[key] = entry;
  }
  if (const List* params = problems.list(*group, "params", where)) {
    for (const Value& param : params->items) {
      if (const auto* number = problems.as<std::int64_t>(param, where + "an entry of 'params'")) {
        saved.params.push_back(*number);
      }
    }
    if (params->items.size() != count) {
      problems.add(where + std::to_string(params->items.size()) + " parameters, where this optimizer has " +
                   std::to_string(count));
    }
  }
  return saved;
}

template <std::size_t n>
Dict saved_tensors(const ParamState& own, const std::array<const char*, n>& names) {
  Dict saved;
  if (own.step.defined()) saved["step"] = own.step;
  for (std::size_t k = 0; k < n; ++k) {
    if (own.tensors[k].defined()) saved[names[k]] = own.tensors[k];
  }
  return saved;
}

/// Reads the state of one parameter, `states` tensors of it, as copies; null if there is none, or none that fits.
template <class Method>
std::unique_ptr<ParamState> read_state(const Value& value, const at::Tensor& parameter, const std::string& name,
                                       std::size_t states, Problems& problems) {
  const Dict* saved = problems.dict(value, "the state of " + name);
  if (saved == nullptr) return nullptr;
  auto own = std::make_unique<ParamState>();
  bool whole = true;
  const auto find = [&](const char* key) {
    const Value* entry = saved->find(key);
    if (entry == nullptr) {
      problems.add(name + " has no '" + key + "'");
      whole = false;
    }
    return entry;
  };
  if constexpr (Method::counts_steps) {
    const auto on_device = parameter.options().dtype(at::kFloat);
    if (const Value* step = find("step")) {
      if (step->is<at::Tensor>() && step->as<at::Tensor>("").numel() == 1) {
        own->step = step->as<at::Tensor>("").detach().reshape({}).to(on_device, false, true);
      } else if (step->is<std::int64_t>() || step->is<double>()) {  // as versions before 1.12 wrote it
        own->step = at::full({}, step->as_number(""), on_device);
      } else {
        problems.add("'step' of " + name + " is " + std::string(step->kind()) + ", not a tensor of one element");
      }
    }
  }
  for (std::size_t k = 0; k < states; ++k) {
    const char* key = Method::state_names[k];
    if (Method::has_first_step) {  // Python's SGD writes None before it has a momentum
      const Value* entry = saved->find(key);
      if (entry == nullptr || entry->is_none()) return nullptr;
    }
    const Value* entry = find(key);
    const at::Tensor* tensor =
        entry == nullptr ? nullptr : problems.as<at::Tensor>(*entry, std::string("'") + key + "' of " + name);
    if (tensor == nullptr) continue;
    if (tensor->sizes() != parameter.sizes()) {
      problems.add(std::string("'") + key + "' of " + name + " has the shape " + c10::str(tensor->sizes()) +
                   ", the parameter " + c10::str(parameter.sizes()));
      continue;
    }
    own->tensors[k] = at::empty_like(parameter).copy_(tensor->detach());
  }
  const bool nothing = !Method::counts_steps && states == 0;
  return whole && !nothing ? std::move(own) : nullptr;
}

}  // namespace fabric::optim::detail
