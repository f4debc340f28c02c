// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <tuple>
#include <typeinfo>
#include <utility>
#include <variant>
#include <vector>

#include <c10/util/Type.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/optimizer.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>
#include <torch/types.h>

#include "fabric/checkpoint/load_plan.hpp"
#include "fabric/checkpoint/pickle_writer.hpp"
#include "fabric/checkpoint/value.hpp"
#include "fabric/error.hpp"
#include "fabric/optim/options.hpp"

/// `torch::optim`'s optimizers in the layout of Python's `Optimizer.state_dict()`: the states by the parameters'
/// numbers, then the groups with all their options.
namespace fabric::detail {

/// What an optimizer keeps. `state(s, o, visit)` shows what is kept for a parameter, as (name, reference, whether it
/// must be there under these options); `python` lists the options that only Python's has, with the one value that says
/// what C++ does.
template <class Optimizer>
struct OptimizerLayout;

template <bool decoupled>
struct AdamLayout {
  template <class State, class Options, class Visit>
  static void state(State& s, const Options& o, const Visit& visit) {
    visit("step", s.step(), true);
    visit("exp_avg", s.exp_avg(), true);
    visit("exp_avg_sq", s.exp_avg_sq(), true);
    visit("max_exp_avg_sq", s.max_exp_avg_sq(), o.amsgrad());
  }
  static Dict python() {
    return {{"maximize", false},       {"foreach", Value()}, {"capturable", false},
            {"differentiable", false}, {"fused", Value()},   {"decoupled_weight_decay", decoupled}};
  }
};
template <>
struct OptimizerLayout<torch::optim::Adam> : AdamLayout<false> {
  using Options = torch::optim::AdamOptions;
  using State = torch::optim::AdamParamState;
};
template <>
struct OptimizerLayout<torch::optim::AdamW> : AdamLayout<true> {
  using Options = torch::optim::AdamWOptions;
  using State = torch::optim::AdamWParamState;
};

template <>
struct OptimizerLayout<torch::optim::SGD> {
  using Options = torch::optim::SGDOptions;
  using State = torch::optim::SGDParamState;
  template <class State, class Options, class Visit>
  static void state(State& s, const Options& /*o*/, const Visit& visit) {
    visit("momentum_buffer", s.momentum_buffer(), false);  // made in the first step that wants it
  }
  static Dict python() {
    return {{"maximize", false}, {"foreach", Value()}, {"differentiable", false}, {"fused", Value()}};
  }
};

template <>
struct OptimizerLayout<torch::optim::Adagrad> {
  using Options = torch::optim::AdagradOptions;
  using State = torch::optim::AdagradParamState;
  template <class State, class Options, class Visit>
  static void state(State& s, const Options& /*o*/, const Visit& visit) {
    visit("step", s.step(), true);
    visit("sum", s.sum(), true);
  }
  static Dict python() {
    return {{"foreach", Value()}, {"maximize", false}, {"differentiable", false}, {"fused", Value()}};
  }
};

template <>
struct OptimizerLayout<torch::optim::RMSprop> {
  using Options = torch::optim::RMSpropOptions;
  using State = torch::optim::RMSpropParamState;
  template <class State, class Options, class Visit>
  static void state(State& s, const Options& o, const Visit& visit) {
    visit("step", s.step(), true);
    visit("square_avg", s.square_avg(), true);
    visit("momentum_buffer", s.momentum_buffer(), o.momentum() > 0);
    visit("grad_avg", s.grad_avg(), o.centered());
  }
  static Dict python() {
    return {{"capturable", false}, {"foreach", Value()}, {"maximize", false}, {"differentiable", false}};
  }
};

/// Calls `visit(optimizer)` with the type that the optimizer has at run time. Throws fabric::Error for others than
/// these.
template <class Optimizer, class Visit>
auto visit_optimizer(Optimizer& optimizer, const std::string& name, const Visit& visit) {
  const std::type_info& type = typeid(optimizer);
  const auto as = [&]<class O>(std::type_identity<O>) { return visit(std::type_identity<O>(), optimizer); };
  if (type == typeid(torch::optim::AdamW)) return as(std::type_identity<torch::optim::AdamW>());
  if (type == typeid(torch::optim::Adam)) return as(std::type_identity<torch::optim::Adam>());
  if (type == typeid(torch::optim::SGD)) return as(std::type_identity<torch::optim::SGD>());
  if (type == typeid(torch::optim::RMSprop)) return as(std::type_identity<torch::optim::RMSprop>());
  if (type == typeid(torch::optim::Adagrad)) return as(std::type_identity<torch::optim::Adagrad>());
  throw Error("fabric: '" + name + "' is an optimizer of type " + c10::demangle(type.name()) +
              ", whose state is not known: Adam, AdamW, SGD, RMSprop and Adagrad of torch::optim are, and classes that "
              "have state_dict() and load_state_dict() and derive from fabric::Stateful");
}

// ---- Saving ----

inline Value option_value(const std::tuple<double, double>& betas) {
  return List{{Value(std::get<0>(betas)), Value(std::get<1>(betas))}, /*is_tuple=*/true};
}
template <class T>
Value option_value(const T& option) {
  return option;
}

/// In Python the count of steps is a tensor.
inline Value state_value(std::int64_t step) { return at::scalar_tensor(step, at::kFloat); }
inline Value state_value(const at::Tensor& tensor) { return tensor.detach(); }
inline bool is_there(std::int64_t /*step*/) { return true; }
inline bool is_there(const at::Tensor& tensor) { return tensor.defined(); }

[[nodiscard]] inline Value optimizer_state(const torch::optim::Optimizer& optimizer, const std::string& name) {
  if (const auto* own = dynamic_cast<const Stateful*>(&optimizer)) return own->state_dict();
  return visit_optimizer(optimizer, name, [](auto type, const torch::optim::Optimizer& known) -> Value {
    using Layout = OptimizerLayout<typename decltype(type)::type>;
    Dict states;
    List groups;
    std::int64_t number = 0;
    for (const auto& group : known.param_groups()) {
      const auto& options = static_cast<const typename Layout::Options&>(group.options());
      Dict entry;
      optim::detail::each_option(options,
                                 [&](const char* key, const auto& option) { entry[key] = option_value(option); });
      for (const auto& [key, only] : Layout::python()) entry[key] = only;
      List numbers;
      for (const at::Tensor& parameter : group.params()) {
        const auto found = known.state().find(parameter.unsafeGetTensorImpl());
        if (found != known.state().end()) {
          Dict state;
          Layout::state(static_cast<const typename Layout::State&>(*found->second), options,
                        [&](const char* key, const auto& kept, bool /*needed*/) {
                          if (is_there(kept)) state[key] = state_value(kept);
                        });
          states[number] = std::move(state);
        }
        numbers.items.emplace_back(number++);
      }
      entry["params"] = std::move(numbers);
      groups.items.emplace_back(std::move(entry));
    }
    return Dict{{"state", std::move(states)}, {"param_groups", std::move(groups)}};
  });
}

// ---- Loading ----

/// Reads an option; a problem of the plan if it is of another kind.
class OptimizerLoader {
 public:
  OptimizerLoader(std::string name, LoadPlan& plan) : name_(std::move(name)), plan_(plan) {}

  template <class Layout>
  void plan(torch::optim::Optimizer& optimizer, const Value& value) {
    const Dict* state = dict(value, name_);
    const Value* states_value = state == nullptr ? nullptr : find(*state, name_, "state");
    const Value* groups_value = state == nullptr ? nullptr : find(*state, name_, "param_groups");
    const Dict* states = states_value == nullptr ? nullptr : dict(*states_value, inner_key(name_, "state"));
    if (states == nullptr || groups_value == nullptr) return;
    const auto* groups = std::get_if<List>(&groups_value->data());
    if (groups == nullptr || groups->items.size() != optimizer.param_groups().size()) {
      const std::string count = groups == nullptr ? "no" : std::to_string(groups->items.size());
      return problem("param_groups", "has " + count + " groups in it, and " +
                                         std::to_string(optimizer.param_groups().size()) + " here");
    }
    using States = std::remove_reference_t<decltype(optimizer.state())>;
    auto fresh = std::make_shared<States>();
    std::int64_t number = 0;
    for (std::size_t g = 0; g < groups->items.size(); ++g) {
      auto& group = optimizer.param_groups()[g];
      const std::string key = inner_key(name_, "param_groups." + std::to_string(g));
      auto options = std::make_shared<typename Layout::Options>(
          static_cast<const typename Layout::Options&>(std::as_const(group).options()));
      const Dict* saved = dict(groups->items[g], key);
      if (saved == nullptr) return;
      read_options<Layout>(*saved, key, *options);
      const Value* params = find(*saved, key, "params");
      const auto* numbers = params == nullptr ? nullptr : std::get_if<List>(&params->data());
      if (numbers == nullptr || numbers->items.size() != group.params().size()) {
        return problem("param_groups." + std::to_string(g), "has another number of parameters in it than the " +
                                                                std::to_string(group.params().size()) + " here");
      }
      for (const at::Tensor& parameter : group.params()) {
        const Value& index = numbers->items[static_cast<std::size_t>(number - first_of_group_)];
        const auto* saved_number = std::get_if<std::int64_t>(&index.data());
        const Value* kept = saved_number == nullptr ? nullptr : states->find(*saved_number);
        if (kept != nullptr) read_state<Layout>(*kept, parameter, *saved_number, *options, *fresh);
        ++number;
      }
      first_of_group_ = number;
      plan_.change([&group, options] { static_cast<typename Layout::Options&>(group.options()) = *options; });
    }
    plan_.change([&optimizer, fresh] { optimizer.state() = std::move(*fresh); });
  }

 private:
  void problem(const std::string& key, const std::string& what) {
    plan_.problem("'" + inner_key(name_, key) + "' " + what);
  }

  const Dict* dict(const Value& value, const std::string& key) {
    const auto* found = std::get_if<Dict>(&value.data());
    if (found == nullptr) plan_.problem("'" + key + "' is " + std::string(value.kind()) + " in it, and a dict here");
    return found;
  }
  const Value* find(const Dict& dict, const std::string& outer, const std::string& key) {
    const Value* found = dict.find(key);
    if (found == nullptr) plan_.missing(inner_key(outer, key));
    return found;
  }

  template <class Layout>
  void read_options(const Dict& saved, const std::string& outer, typename Layout::Options& options) {
    const Dict python = Layout::python();
    std::vector<std::string> known{"params", "initial_lr"};
    optim::detail::each_option(options, [&](const char* key, auto& option) {
      known.emplace_back(key);
      if (const Value* value = find(saved, outer, key)) read_option(*value, inner_key(outer, key), option);
    });
    for (const auto& [key, value] : saved) {
      if (std::find(known.begin(), known.end(), to_text(key)) != known.end()) continue;
      const Value* only = python.find(key);
      if (only == nullptr) {
        plan_.unexpected(inner_key(outer, to_text(key)));
      } else if ((to_text(key) == "maximize" || to_text(key) == "decoupled_weight_decay") &&
                 std::holds_alternative<bool>(value.data()) &&
                 std::get<bool>(value.data()) != std::get<bool>(only->data())) {
        plan_.problem("'" + inner_key(outer, to_text(key)) + "' is " +
                      (std::get<bool>(value.data()) ? "true" : "false") + " in it, which this optimizer cannot do");
      }
    }
  }

  void read_option(const Value& value, const std::string& key, bool& option) {
    if (const auto* flag = std::get_if<bool>(&value.data())) {
      option = *flag;
    } else {
      plan_.problem("'" + key + "' is " + std::string(value.kind()) + " in it, and a bool here");
    }
  }
  void read_option(const Value& value, const std::string& key, double& option) {
    if (const auto* tensor = std::get_if<at::Tensor>(&value.data()); tensor != nullptr && tensor->numel() == 1) {
      option = tensor->item<double>();  // a learning rate that is a tensor
    } else if (value.is<double>() || value.is<std::int64_t>()) {
      option = value.as_number(key);
    } else {
      plan_.problem("'" + key + "' is " + std::string(value.kind()) + " in it, and a number here");
    }
  }
  void read_option(const Value& value, const std::string& key, std::tuple<double, double>& option) {
    const auto* list = std::get_if<List>(&value.data());
    if (list == nullptr || list->items.size() != 2)
      return plan_.problem("'" + key + "' is not a pair of numbers in it");
    read_option(list->items[0], key + ".0", std::get<0>(option));
    read_option(list->items[1], key + ".1", std::get<1>(option));
  }

  template <class Layout, class States>
  void read_state(const Value& value, const at::Tensor& parameter, std::int64_t number,
                  const typename Layout::Options& options, States& fresh) {
    const std::string outer = inner_key(name_, "state." + std::to_string(number));
    const Dict* saved = dict(value, outer);
    if (saved == nullptr) return;
    auto state = std::make_unique<typename Layout::State>();
    bool empty = true;
    std::size_t known = 0;
    Layout::state(*state, options, [&](const char* key, auto& kept, bool needed) {
      const Value* found = saved->find(key);
      if (found != nullptr) ++known;
      if (found == nullptr || found->is_none()) {
        if (needed) plan_.missing(inner_key(outer, key));
      } else {
        empty = false;
        read_kept(*found, parameter, inner_key(outer, key), kept);
      }
    });
    if (known < saved->size()) {
      for (const auto& [key, inner] : *saved) {
        bool own = false;
        Layout::state(*state, options,
                      [&, &key = key](const char* known_key, auto&, bool) { own = own || to_text(key) == known_key; });
        if (!own) plan_.unexpected(inner_key(outer, to_text(key)));
      }
    }
    if (!empty) fresh[parameter.unsafeGetTensorImpl()] = std::move(state);
  }

  void read_kept(const Value& value, const at::Tensor& /*parameter*/, const std::string& key, std::int64_t& step) {
    double number = -1;
    if (const auto* tensor = std::get_if<at::Tensor>(&value.data()); tensor != nullptr && tensor->numel() == 1) {
      number = tensor->item<double>();
    } else if (value.is<std::int64_t>() || value.is<double>()) {
      number = value.as_number(key);
    }
    if (!(number >= 0) || number != std::floor(number) || number > 9e15) {
      return plan_.problem("'" + key + "' is no count of steps in it");
    }
    step = static_cast<std::int64_t>(number);
  }
  void read_kept(const Value& value, const at::Tensor& parameter, const std::string& key, at::Tensor& kept) {
    if (!check_tensor(parameter, value, key, plan_)) return;
    const at::NoGradGuard no_grad;
    kept = at::empty_like(parameter).copy_(std::get<at::Tensor>(value.data())).detach();
  }

  std::string name_;
  LoadPlan& plan_;
  std::int64_t first_of_group_ = 0;
};

inline void plan_optimizer(torch::optim::Optimizer& optimizer, const Value& value, const std::string& name,
                           LoadPlan& plan) {
  if (auto* own = dynamic_cast<Stateful*>(&optimizer)) {
    plan.load([own, state = DeepCopy().copy(value)] { own->load_state_dict(state); },
              [own] { return [own, before = DeepCopy().copy(own->state_dict())] { own->load_state_dict(before); }; });
    return;
  }
  visit_optimizer(optimizer, name, [&](auto type, torch::optim::Optimizer& known) {
    OptimizerLoader(name, plan).plan<OptimizerLayout<typename decltype(type)::type>>(known, value);
  });
}

}  // namespace fabric::detail
