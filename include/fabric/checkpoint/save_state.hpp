// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

#include <boost/hana/accessors.hpp>
#include <boost/hana/core/to.hpp>
#include <boost/hana/for_each.hpp>
#include <torch/types.h>

#include "fabric/checkpoint/kinds.hpp"
#include "fabric/checkpoint/module_state.hpp"
#include "fabric/checkpoint/optimizer_state.hpp"
#include "fabric/checkpoint/spread.hpp"
#include "fabric/checkpoint/spread_optimizer.hpp"
#include "fabric/checkpoint/value.hpp"
#include "fabric/error.hpp"

namespace fabric::detail {

/// What an optimizer knows of its parameters, even if their module is not saved with it.
template <class Wrapper>
void add_shards_of(const Wrapper& optimizer, Spread& spread) {
  if constexpr (requires { optimizer.states().front()->shards(); }) {
    for (const auto& state : optimizer.states()) spread.add_state(*state, "");
  }
}

/// The state of any object that a checkpoint can hold. Tensors are shared with the object.
template <class T>
[[nodiscard]] Value to_value(const T& object, const std::string& key, Saving& saving) {
  if constexpr (std::same_as<T, Value> || std::same_as<T, List> || std::same_as<T, Dict> || std::same_as<T, bool>) {
    return object;
  } else if constexpr (std::same_as<T, fabric::State>) {
    Dict dict;
    for (const auto& entry : object.entries()) {
      if (dict.find(entry.name()) != nullptr) throw Error("fabric: save: the state has '" + entry.name() + "' twice");
      dict[entry.name()] = entry.save(saving, inner_key(key, entry.name()));
    }
    return dict;
  } else if constexpr (std::is_base_of_v<at::Tensor, T>) {
    return object.defined() ? Value(object.detach()) : Value();
  } else if constexpr (HasRankedState<T>) {
    if (saving.only_modules) return {};
    return object.state_dict(saving.ranks);
  } else if constexpr (HasStateDict<T> && !OptimizerArgument<T>) {
    if (saving.only_modules) return {};
    return object.state_dict();
  } else if constexpr (WrapsModule<T>) {
    if constexpr (WrapsShards<T>) {
      static_assert(!HasStateDict<std::remove_cvref_t<decltype(object.module())>>,
                    "fabric: a module with a state_dict() of its own cannot be saved by a strategy that shards");
      saving.spread.add_state(*object.state(), key);
    }
    return to_value(object.module(), key, saving);
  } else if constexpr (WrapsOptimizer<T>) {
    add_shards_of(object, saving.spread);
    return to_value(object.optimizer(), key, saving);
  } else if constexpr (ModuleArgument<T>) {
    const auto& module = behind(object);
    if (saving.only_modules) {
      saving.spread.add(module, key);
      return {};
    }
    if constexpr (HasStateDict<std::remove_cvref_t<decltype(module)>>) return module.state_dict();
    return module_state(module, key, saving.spread);
  } else if constexpr (OptimizerArgument<T>) {
    if (saving.only_modules) return {};
    const auto& optimizer = behind(object);
    if constexpr (HasStateDict<std::remove_cvref_t<decltype(optimizer)>>) {
      return saved_optimizer(optimizer.state_dict(), optimizer, key, saving);
    } else {
      return saved_optimizer(optimizer_state(optimizer, key), optimizer, key, saving);
    }
  } else if constexpr (Scheduler<T>) {
    auto& scheduler = const_cast<T&>(object);  // only read
    List rates;
    for (const double rate : SchedulerAccess::rates(scheduler)) rates.items.emplace_back(rate);
    const std::int64_t steps = SchedulerAccess::steps(scheduler);
    return Dict{{"last_epoch", steps}, {"_step_count", steps + 1}, {"_last_lr", std::move(rates)}};
  } else if constexpr (std::is_integral_v<T> || std::is_enum_v<T>) {
    return static_cast<std::int64_t>(object);
  } else if constexpr (std::is_floating_point_v<T>) {
    return static_cast<double>(object);
  } else if constexpr (std::is_convertible_v<const T&, std::string_view>) {
    return std::string(std::string_view(object));
  } else if constexpr (is_reference_wrapper<T>) {
    return to_value(object.get(), key, saving);
  } else if constexpr (tree::OptionalLike<T>) {
    return object.has_value() ? to_value(*object, key, saving) : Value();
  } else if constexpr (PointerLike<T>) {
    return object == nullptr ? Value() : to_value(*object, key, saving);
  } else if constexpr (MapLike<T>) {
    Dict dict;
    for (const auto& [own, inner] : object) {
      if constexpr (std::integral<typename T::key_type>) {
        dict[static_cast<std::int64_t>(own)] = to_value(inner, inner_key(key, std::to_string(own)), saving);
      } else {
        dict[own] = to_value(inner, inner_key(key, own), saving);
      }
    }
    return dict;
  } else if constexpr (ListLike<T>) {
    List list;
    for (const auto& item : object) {
      list.items.push_back(
          to_value<typename T::value_type>(item, inner_key(key, std::to_string(list.items.size())), saving));
    }
    return list;
  } else if constexpr (boost::hana::Struct<T>::value) {
    Dict dict;
    boost::hana::for_each(boost::hana::accessors<T>(), [&](auto member) {
      const std::string name = boost::hana::to<const char*>(boost::hana::first(member));
      const auto& value = boost::hana::second(member)(object);
      dict[name] = to_value(value, inner_key(key, name), saving);
    });
    return dict;
  } else if constexpr (tree::TupleLike<T>) {
    List list{{}, /*is_tuple=*/true};
    std::apply(
        [&](const auto&... items) {
          (list.items.push_back(to_value(items, inner_key(key, std::to_string(list.items.size())), saving)), ...);
        },
        object);
    return list;
  } else {
    static_assert(
        has_no_state<T>,
        "fabric: a checkpoint cannot hold this type. It can hold modules, optimizers, schedulers, tensors, "
        "numbers, texts, containers of them, fabric::State, types with state_dict() and load_state_dict(), and "
        "structs adapted with BOOST_HANA_ADAPT_STRUCT (C++ knows no names of members otherwise)");
  }
}

}  // namespace fabric::detail
