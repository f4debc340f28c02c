// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <variant>
#include <vector>

#include <torch/optim/optimizer.h>
#include <torch/types.h>

#include "fabric/checkpoint/load_plan.hpp"
#include "fabric/checkpoint/pickle_writer.hpp"
#include "fabric/checkpoint/spread.hpp"
#include "fabric/checkpoint/value.hpp"
#include "fabric/error.hpp"

/// An optimizer's state in Python's layouts, where its parameters are spread over the ranks or called by their names.
/// `Optimizer.state_dict()` numbers parameters; `get_optimizer_state_dict` of torch.distributed.checkpoint names them.
namespace fabric::detail {

/// The parameters of all groups, in the order of their numbers.
[[nodiscard]] inline std::vector<at::Tensor> numbered_parameters(const torch::optim::Optimizer& optimizer) {
  std::vector<at::Tensor> parameters;
  for (const auto& group : optimizer.param_groups()) {
    parameters.insert(parameters.end(), group.params().begin(), group.params().end());
  }
  return parameters;
}

/// What the parameters are called: their names in their modules, with the module's key in front where two would have
/// the same. Empty for one that is in no module that is saved with the optimizer.
[[nodiscard]] inline std::vector<std::string> names_of(const std::vector<at::Tensor>& parameters,
                                                       const Spread& spread) {
  std::vector<std::string> names;
  std::unordered_map<std::string, int> uses;
  for (const at::Tensor& parameter : parameters) {
    const auto* known = spread.parameter(parameter);
    names.push_back(known == nullptr ? "" : known->name);
    ++uses[names.back()];
  }
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (!names[i].empty() && uses[names[i]] > 1) names[i] = spread.parameter(parameters[i])->module + "." + names[i];
  }
  return names;
}

/// The number that a key is, also as a text.
[[nodiscard]] inline std::optional<std::int64_t> number_in(const Dict::Key& key) {
  if (const auto* number = std::get_if<std::int64_t>(&key)) return *number;
  const auto& text = std::get<std::string>(key);
  std::int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc() && end == text.data() + text.size() && !text.empty() ? std::optional(number)
                                                                                   : std::nullopt;
}

// ---- Saving ----

/// The state of the parameter's elements that are here becomes what stands for that of all; what there is only once,
/// such as the count of steps, is saved by the rank that has the parameter's first element, since others may have none.
inline void spread_state(Dict& state, const Spread::Parameter& parameter, const std::string& key, Spread& spread) {
  const Shard& shard = *parameter.shard;
  const bool first = parameter.has_first();
  for (auto& [name, value] : state) {
    auto* tensor = std::get_if<at::Tensor>(&value.data());
    if (tensor == nullptr || !tensor->defined()) continue;
    if (to_text(name) != "step" && tensor->sizes() == shard.master.sizes()) {
      value = spread.stand_in(parameter, *tensor);
    } else if (tensor->numel() == 1) {
      if (shard.parameter.numel() > 0) spread.set_writes(*tensor, first && parameter.writes);
    } else {
      throw Error("fabric: save: '" + inner_key(key, to_text(name)) + "' has the shape " + c10::str(tensor->sizes()) +
                  ", and this rank's part of the parameter " + c10::str(shard.master.sizes()) +
                  ": an optimizer that keeps something else than numbers for each element cannot be saved from a "
                  "strategy that shards");
    }
  }
}

/// What of an optimizer's `state_dict` is saved.
[[nodiscard]] inline Value saved_optimizer(Value value, const torch::optim::Optimizer& optimizer,
                                           const std::string& key, Saving& saving) {
  auto* dict = std::get_if<Dict>(&value.data());
  Value* states_value = dict == nullptr ? nullptr : dict->find("state");
  Value* groups_value = dict == nullptr ? nullptr : dict->find("param_groups");
  auto* states = states_value == nullptr ? nullptr : std::get_if<Dict>(&states_value->data());
  auto* groups = groups_value == nullptr ? nullptr : std::get_if<List>(&groups_value->data());
  if (states == nullptr || groups == nullptr) return value;  // a layout of its own
  const std::vector<at::Tensor> parameters = numbered_parameters(optimizer);
  const std::vector<std::string> names = names_of(parameters, saving.spread);
  const bool by_name =
      saving.by_name && std::none_of(names.begin(), names.end(), [](const std::string& name) { return name.empty(); });
  Dict named;
  for (auto& [number_key, state] : *states) {
    const auto number = number_in(number_key);
    if (!number || *number < 0 || static_cast<std::size_t>(*number) >= parameters.size()) return value;
    const auto place = static_cast<std::size_t>(*number);
    const auto* parameter = saving.spread.spread_parameter(parameters[place]);
    if (auto* inner = std::get_if<Dict>(&state.data()); parameter != nullptr && inner != nullptr) {
      spread_state(*inner, *parameter, inner_key(key, "state." + std::to_string(place)), saving.spread);
    }
    if (by_name) named[names[place]] = state;
  }
  if (!by_name) return value;
  *states = std::move(named);
  for (Value& group : groups->items) {
    auto* entries = std::get_if<Dict>(&group.data());
    Value* params = entries == nullptr ? nullptr : entries->find("params");
    auto* numbers = params == nullptr ? nullptr : std::get_if<List>(&params->data());
    if (numbers == nullptr) continue;
    for (Value& number : numbers->items) {
      const auto* place = std::get_if<std::int64_t>(&number.data());
      if (place != nullptr && *place >= 0 && static_cast<std::size_t>(*place) < names.size()) {
        number = names[static_cast<std::size_t>(*place)];
      }
    }
  }
  return value;
}

// ---- Loading ----

/// Brings what was saved of an optimizer into the layout of `Optimizer.state_dict()`, with this program's numbers for
/// the parameters and this rank's parts of what is kept for them.
class OptimizerState {
 public:
  OptimizerState(const torch::optim::Optimizer& optimizer, LoadPlan& plan)
      : optimizer_(optimizer),
        plan_(plan),
        parameters_(numbered_parameters(optimizer)),
        names_(names_of(parameters_, plan.spread())) {}

  [[nodiscard]] Value read(const Value& value) const {
    const auto* saved = std::get_if<Dict>(&value.data());
    if (saved == nullptr) return value;
    Dict nested;
    if (is_flat(*saved)) saved = &(nested = unflatten(*saved));
    Dict numbered = *saved;
    // Python leaves out an empty dict.
    if (numbered.find("param_groups") != nullptr && numbered.find("state") == nullptr) numbered["state"] = Dict();
    Value* states_value = numbered.find("state");
    auto* states = states_value == nullptr ? nullptr : std::get_if<Dict>(&states_value->data());
    auto* groups = groups_of(numbered);
    if (states == nullptr || groups == nullptr) return plan_.whole(value);
    number(*states, *groups);
    for (auto& [key, state] : *states) {
      const auto place = number_in(key);
      const bool known = place && *place >= 0 && static_cast<std::size_t>(*place) < parameters_.size();
      state = known ? local(state, parameters_[static_cast<std::size_t>(*place)]) : plan_.whole(state);
    }
    return numbered;
  }

 private:
  static List* groups_of(Dict& dict) {
    Value* groups = dict.find("param_groups");
    return groups == nullptr ? nullptr : std::get_if<List>(&groups->data());
  }
  static List* params_of(Value& group) {
    auto* entries = std::get_if<Dict>(&group.data());
    Value* params = entries == nullptr ? nullptr : entries->find("params");
    return params == nullptr ? nullptr : std::get_if<List>(&params->data());
  }

  // ---- `flatten_optimizer_state_dict=True`: "state.fc.weight.exp_avg", "param_groups.fc.weight.lr" ----

  static bool is_flat(const Dict& saved) {
    if (saved.size() == 0) return false;
    return std::all_of(saved.begin(), saved.end(), [](const auto& entry) {
      const std::string key = to_text(entry.first);
      return key.starts_with("state.") || key.starts_with("param_groups.");
    });
  }
  [[nodiscard]] Dict unflatten(const Dict& saved) const {
    Dict states;
    List groups;
    std::size_t place = 0;
    for (const auto& group : optimizer_.param_groups()) {
      Dict options;
      List params;
      for (std::size_t i = 0; i < group.params().size(); ++i, ++place) {
        Dict state;
        const std::string in_state = "state." + names_[place] + ".";
        const std::string in_group = "param_groups." + names_[place] + ".";
        for (const auto& [key, value] : saved) {
          const std::string text = to_text(key);
          if (text.starts_with(in_state)) state[text.substr(in_state.size())] = value;
          if (text.starts_with(in_group)) options[text.substr(in_group.size())] = value;
        }
        if (state.size() > 0) states[names_[place]] = std::move(state);
        params.items.emplace_back(names_[place]);
      }
      options["params"] = std::move(params);
      groups.items.emplace_back(std::move(options));
    }
    return {{"state", std::move(states)}, {"param_groups", std::move(groups)}};
  }

  // ---- Names ----

  /// Names become the numbers that the parameters have here; groups come in this program's order.
  void number(Dict& states, List& groups) const {
    std::unordered_map<std::string, std::int64_t> numbers;
    bool named = true;
    for (std::size_t i = 0; i < names_.size(); ++i) {
      named = named && !names_[i].empty();
      numbers.emplace(names_[i], static_cast<std::int64_t>(i));
    }
    if (!named) numbers.clear();
    bool has_names = false;
    std::vector<std::pair<std::int64_t, Value>> sorted;
    std::int64_t next = 0;
    for (Value& group : groups.items) {
      std::vector<std::int64_t> own;
      if (List* params = params_of(group)) {
        for (const Value& param : params->items) {
          const auto* name = std::get_if<std::string>(&param.data());
          if (name == nullptr) continue;
          has_names = true;
          // Without the modules' names the order must do, as it does in Python.
          if (!named) numbers.emplace(*name, next++);
          if (const auto found = numbers.find(*name); found != numbers.end()) own.push_back(found->second);
        }
        if (own.size() == params->items.size()) {
          std::sort(own.begin(), own.end());
          for (std::size_t i = 0; i < own.size(); ++i) params->items[i] = own[i];
        }
      }
      sorted.emplace_back(own.empty() ? static_cast<std::int64_t>(names_.size()) : own.front(), std::move(group));
    }
    if (has_names) {
      std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    }
    for (std::size_t i = 0; i < sorted.size(); ++i) groups.items[i] = std::move(sorted[i].second);
    Dict renamed;
    for (auto& [key, state] : states) {
      if (const auto found = numbers.find(to_text(key)); has_names && found != numbers.end()) {
        renamed[found->second] = std::move(state);
      } else if (const auto own = number_in(key)) {
        renamed[*own] = std::move(state);
      } else {
        renamed[key] = std::move(state);
      }
    }
    states = std::move(renamed);
  }

  /// This rank's part of what is kept for a parameter.
  [[nodiscard]] Value local(const Value& value, const at::Tensor& own) const {
    const auto* parameter = plan_.spread().spread_parameter(own);
    const auto* state = std::get_if<Dict>(&value.data());
    if (parameter == nullptr || state == nullptr) return plan_.whole(value);
    Dict parts;
    for (const auto& [name, kept] : *state) {
      const auto* tensor = std::get_if<at::Tensor>(&kept.data());
      const bool for_each_element =
          tensor != nullptr && to_text(name) != "step" && tensor->sizes() == at::IntArrayRef(parameter->sizes);
      parts[name] = for_each_element ? Value(plan_.read_boxes(*tensor, parameter->boxes())) : plan_.whole(kept);
    }
    return parts;
  }

  const torch::optim::Optimizer& optimizer_;
  LoadPlan& plan_;
  std::vector<at::Tensor> parameters_;
  std::vector<std::string> names_;
};

}  // namespace fabric::detail
