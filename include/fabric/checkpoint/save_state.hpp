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
#include <torch/torch.h>

#include "fabric/checkpoint/kinds.hpp"
#include "fabric/checkpoint/module_state.hpp"
#include "fabric/checkpoint/optimizer_state.hpp"
#include "fabric/checkpoint/ranks.hpp"
#include "fabric/checkpoint/value.hpp"
#include "fabric/error.hpp"

namespace fabric::detail {

/// The state of any object that a checkpoint can hold. Tensors are shared with the object.
template <class T>
[[nodiscard]] Value to_value(const T& object, const std::string& key, Ranks& ranks) {
  if constexpr (std::same_as<T, Value> || std::same_as<T, List> || std::same_as<T, Dict> || std::same_as<T, bool>) {
    return object;
  } else if constexpr (std::same_as<T, fabric::State>) {
    Dict dict;
    for (const auto& entry : object.entries()) {
      if (dict.find(entry.name()) != nullptr) throw Error("fabric: save: the state has '" + entry.name() + "' twice");
      dict[entry.name()] = entry.save(ranks, inner_key(key, entry.name()));
    }
    return dict;
  } else if constexpr (std::is_base_of_v<at::Tensor, T>) {
    return object.defined() ? Value(object.detach()) : Value();
  } else if constexpr (HasRankedState<T>) {
    return object.state_dict(ranks);
  } else if constexpr (HasStateDict<T>) {
    return object.state_dict();
  } else if constexpr (WrapsModule<T>) {
    return to_value(object.module(), key, ranks);
  } else if constexpr (WrapsOptimizer<T>) {
    return to_value(object.optimizer(), key, ranks);
  } else if constexpr (ModuleArgument<T>) {
    if constexpr (HasStateDict<std::remove_cvref_t<decltype(behind(object))>>) return behind(object).state_dict();
    return module_state(behind(object));
  } else if constexpr (OptimizerArgument<T>) {
    if constexpr (HasStateDict<std::remove_cvref_t<decltype(behind(object))>>) return behind(object).state_dict();
    return optimizer_state(behind(object), key);
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
    return to_value(object.get(), key, ranks);
  } else if constexpr (tree::OptionalLike<T>) {
    return object.has_value() ? to_value(*object, key, ranks) : Value();
  } else if constexpr (PointerLike<T>) {
    return object == nullptr ? Value() : to_value(*object, key, ranks);
  } else if constexpr (MapLike<T>) {
    Dict dict;
    for (const auto& [own, inner] : object) {
      if constexpr (std::integral<typename T::key_type>) {
        dict[static_cast<std::int64_t>(own)] = to_value(inner, inner_key(key, std::to_string(own)), ranks);
      } else {
        dict[own] = to_value(inner, inner_key(key, own), ranks);
      }
    }
    return dict;
  } else if constexpr (ListLike<T>) {
    List list;
    for (const auto& item : object) {
      list.items.push_back(
          to_value<typename T::value_type>(item, inner_key(key, std::to_string(list.items.size())), ranks));
    }
    return list;
  } else if constexpr (boost::hana::Struct<T>::value) {
    Dict dict;
    boost::hana::for_each(boost::hana::accessors<T>(), [&](auto member) {
      const std::string name = boost::hana::to<const char*>(boost::hana::first(member));
      const auto& value = boost::hana::second(member)(object);
      dict[name] = to_value(value, inner_key(key, name), ranks);
    });
    return dict;
  } else if constexpr (tree::TupleLike<T>) {
    List list{{}, /*is_tuple=*/true};
    std::apply(
        [&](const auto&... items) {
          (list.items.push_back(to_value(items, inner_key(key, std::to_string(list.items.size())), ranks)), ...);
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
