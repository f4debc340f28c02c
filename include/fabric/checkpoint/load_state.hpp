// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>

#include <boost/hana/accessors.hpp>
#include <boost/hana/core/to.hpp>
#include <boost/hana/for_each.hpp>
#include <torch/types.h>

#include "fabric/checkpoint/kinds.hpp"
#include "fabric/checkpoint/load_plan.hpp"
#include "fabric/checkpoint/module_state.hpp"
#include "fabric/checkpoint/optimizer_state.hpp"
#include "fabric/checkpoint/spread.hpp"
#include "fabric/checkpoint/spread_optimizer.hpp"
#include "fabric/checkpoint/value.hpp"
#include "fabric/error.hpp"

namespace fabric::detail {

inline void wrong_kind(const Value& value, const char* wanted, const std::string& key, LoadPlan& plan) {
  plan.problem("'" + key + "' is " + std::string(value.kind()) + " in it, and " + wanted + " here");
}

/// Builds data from a checkpoint. False, and a problem in the plan, if the checkpoint has something else there.
template <class T>
bool parse(const Value& value, T& result, const std::string& key, LoadPlan& plan) {
  if constexpr (std::same_as<T, Value>) {
    result = DeepCopy().copy(value);
    return true;
  } else if constexpr (std::same_as<T, List> || std::same_as<T, Dict>) {
    if (!value.is<T>()) return wrong_kind(value, std::same_as<T, List> ? "a list" : "a dict", key, plan), false;
    result = std::get<T>(DeepCopy().copy(value).data());
    return true;
  } else if constexpr (std::same_as<T, at::Tensor>) {
    if (value.is_none()) return result = at::Tensor(), true;
    if (!value.is<at::Tensor>()) return wrong_kind(value, "a tensor", key, plan), false;
    result = std::get<at::Tensor>(DeepCopy().copy(value).data());
    return true;
  } else if constexpr (std::same_as<T, bool>) {
    if (!value.is<bool>()) return wrong_kind(value, "a bool", key, plan), false;
    result = std::get<bool>(value.data());
    return true;
  } else if constexpr (std::is_enum_v<T> || std::is_integral_v<T>) {
    using Integer =
        typename std::conditional_t<std::is_enum_v<T>, std::underlying_type<T>, std::type_identity<T>>::type;
    const auto* number = std::get_if<std::int64_t>(&value.data());
    if (number == nullptr) return wrong_kind(value, "an integer", key, plan), false;
    const auto narrowed = static_cast<Integer>(*number);
    if (static_cast<std::int64_t>(narrowed) != *number) {
      plan.problem("'" + key + "' is " + std::to_string(*number) + " in it, which is too large for its type here");
      return false;
    }
    result = static_cast<T>(narrowed);
    return true;
  } else if constexpr (std::is_floating_point_v<T>) {
    if (!value.is<double>() && !value.is<std::int64_t>()) return wrong_kind(value, "a number", key, plan), false;
    result = static_cast<T>(value.as_number(key));
    return true;
  } else if constexpr (PlainText<T>) {
    if (!value.is<std::string>()) return wrong_kind(value, "a text", key, plan), false;
    result = std::get<std::string>(value.data());
    return true;
  } else if constexpr (tree::OptionalLike<T>) {
    if (value.is_none()) return result.reset(), true;
    return parse(value, result.emplace(), key, plan);
  } else if constexpr (MapLike<T>) {
    const auto* dict = std::get_if<Dict>(&value.data());
    if (dict == nullptr) return wrong_kind(value, "a map", key, plan), false;
    bool good = true;
    for (const auto& [own, inner] : *dict) {
      std::optional<typename T::key_type> saved;
      if constexpr (std::integral<typename T::key_type>) {
        if (const auto number = number_in(own)) saved = static_cast<typename T::key_type>(*number);
      } else if (const auto* text = std::get_if<std::string>(&own)) {
        saved = *text;
      }
      if (!saved) {
        plan.problem("'" + inner_key(key, to_text(own)) + "' has a key of another kind than here");
        good = false;
      } else {
        good = parse(inner, result[*saved], inner_key(key, to_text(own)), plan) && good;
      }
    }
    return good;
  } else {
    static_assert(ListLike<T>);
    const auto* list = std::get_if<List>(&value.data());
    if (list == nullptr) return wrong_kind(value, "a list", key, plan), false;
    bool good = true;
    if constexpr (GrowingList<T>) {
      for (std::size_t i = 0; i < list->items.size(); ++i) {
        typename T::value_type item{};
        good = parse(list->items[i], item, inner_key(key, std::to_string(i)), plan) && good;
        result.push_back(std::move(item));
      }
    } else {
      if (list->items.size() != static_cast<std::size_t>(std::distance(std::begin(result), std::end(result)))) {
        plan.problem("'" + key + "' has " + std::to_string(list->items.size()) +
                     " items in it, and another number here");
        return false;
      }
      std::size_t i = 0;
      for (auto& item : result) {
        good = parse(list->items[i], item, inner_key(key, std::to_string(i)), plan) && good;
        ++i;
      }
    }
    return good;
  }
}

/// Plans the loading of an object by its own `load_state_dict`.
template <class T>
void plan_state_dict(T& object, const Value& value, LoadPlan& plan) {
  plan.load([&object, state = DeepCopy().copy(value)] { object.load_state_dict(state); },
            [&object] {
              return [&object, before = DeepCopy().copy(object.state_dict())] { object.load_state_dict(before); };
            });
}

/// Plans the loading of any object that a checkpoint can hold.
template <class T>
void plan_load(T& object, const Value& value, const std::string& key, LoadPlan& plan) {
  if constexpr (std::same_as<std::remove_const_t<T>, fabric::State>) {
    const auto* dict = std::get_if<Dict>(&value.data());
    if (dict == nullptr) return wrong_kind(value, "a dict", key, plan);
    for (const auto& entry : object.entries()) {
      const std::string name = inner_key(key, entry.name());
      if (const Value* saved = dict->find(entry.name())) {
        entry.plan(*saved, name, plan);
      } else {
        plan.missing(name);
      }
    }
  } else if constexpr (std::is_const_v<T>) {
    plan.problem("'" + key + "' is const here, so that nothing can be loaded into it");
  } else if constexpr (HasRankedState<T>) {
    try {
      const Value whole = plan.whole(value);
      object.load_state_dict(whole, plan.world(), /*check_only=*/true);
      plan.change([&object, &world = plan.world(), state = DeepCopy().copy(whole)] {
        object.load_state_dict(state, world, /*check_only=*/false);
      });
    } catch (const Error& error) {
      if (plan.strict()) {
        plan.problem("'" + key + "': " + error.what());
      } else {
        plan.missing(key);
      }
    }
  } else if constexpr (HasStateDict<T> && !OptimizerArgument<T>) {
    plan_state_dict(object, plan.whole(value), plan);
  } else if constexpr (WrapsModule<T>) {
    plan_load(object.module(), value, key, plan);
    if constexpr (WrapsShards<T>) plan.change([state = object.state()] { state->changed(); });
  } else if constexpr (WrapsOptimizer<T>) {
    plan_load(object.optimizer(), value, key, plan);
  } else if constexpr (ModuleArgument<T>) {
    auto& module = behind(object);
    if constexpr (HasStateDict<std::remove_cvref_t<decltype(module)>>) {
      plan_load<std::remove_cvref_t<decltype(module)>>(module, value, key, plan);
    } else {
      plan_module(module, value, key, plan);
    }
  } else if constexpr (OptimizerArgument<T>) {
    auto& optimizer = behind(object);
    const Value state = OptimizerState(optimizer, plan).read(value);
    if constexpr (HasStateDict<std::remove_cvref_t<decltype(optimizer)>>) {
      plan_state_dict(optimizer, state, plan);
    } else {
      plan_optimizer(optimizer, state, key, plan);
    }
  } else if constexpr (Scheduler<T>) {
    const auto* dict = std::get_if<Dict>(&value.data());
    const Value* steps = dict == nullptr ? nullptr : dict->find("last_epoch");
    unsigned count = 0;
    if (steps == nullptr) return plan.missing(inner_key(key, "last_epoch"));
    if (!parse(*steps, count, inner_key(key, "last_epoch"), plan)) return;
    plan.change([&object, count] { SchedulerAccess::steps(object) = count; });
  } else if constexpr (is_reference_wrapper<T>) {
    plan_load(object.get(), value, key, plan);
  } else if constexpr (std::same_as<T, at::Tensor>) {
    if (!object.defined() || value.is_none()) {
      auto fresh = std::make_shared<at::Tensor>();
      if (parse(plan.whole(value), *fresh, key, plan)) plan.change([&object, fresh] { object = *fresh; });
    } else if (check_tensor(object, value, key, plan)) {
      plan.fill(object.detach(), std::get<at::Tensor>(value.data()));
    }
  } else if constexpr (is_data<T>()) {
    // A fixed number of items (std::array) is known only from the object.
    auto fresh = std::make_shared<T>();
    if (parse(plan.whole(value), *fresh, key, plan)) plan.change([&object, fresh] { object = std::move(*fresh); });
  } else if constexpr (tree::OptionalLike<T>) {
    if (object.has_value()) return plan_load(*object, value, key, plan);
    plan.problem("'" + key + "' is empty here, so that there is nothing to load into");
  } else if constexpr (PointerLike<T>) {
    if (object != nullptr) return plan_load(*object, value, key, plan);
    plan.problem("'" + key + "' is null here, so that there is nothing to load into");
  } else if constexpr (MapLike<T>) {
    const auto* dict = std::get_if<Dict>(&value.data());
    if (dict == nullptr) return wrong_kind(value, "a map", key, plan);
    for (auto& [own, inner] : object) {
      Dict::Key saved_key;
      if constexpr (std::integral<typename T::key_type>) {
        saved_key = static_cast<std::int64_t>(own);
      } else {
        saved_key = own;
      }
      const std::string name = inner_key(key, to_text(saved_key));
      const Value* saved = dict->find(saved_key);
      if (saved == nullptr) saved = dict->find(to_text(saved_key));  // some formats have texts as keys alone
      if (saved != nullptr) {
        plan_load(inner, *saved, name, plan);
      } else {
        plan.missing(name);
      }
    }
  } else if constexpr (boost::hana::Struct<T>::value) {
    const auto* dict = std::get_if<Dict>(&value.data());
    if (dict == nullptr) return wrong_kind(value, "a dict", key, plan);
    boost::hana::for_each(boost::hana::accessors<T>(), [&](auto member) {
      const std::string name = boost::hana::to<const char*>(boost::hana::first(member));
      auto& inner = boost::hana::second(member)(object);
      if (const Value* saved = dict->find(name)) {
        plan_load(inner, *saved, inner_key(key, name), plan);
      } else {
        plan.missing(inner_key(key, name));
      }
    });
  } else if constexpr (ListLike<T> || tree::TupleLike<T>) {
    const auto* list = std::get_if<List>(&value.data());
    if (list == nullptr) return wrong_kind(value, "a list", key, plan);
    std::size_t number = 0;
    const auto each = [&](auto& item) {
      if (number < list->items.size()) {
        plan_load(item, list->items[number], inner_key(key, std::to_string(number)), plan);
      } else {
        plan.missing(inner_key(key, std::to_string(number)));
      }
      ++number;
    };
    if constexpr (ListLike<T>) {
      for (auto& item : object) each(item);
    } else {
      std::apply([&](auto&... items) { (each(items), ...); }, object);
    }
    if (number < list->items.size()) plan.unexpected(inner_key(key, std::to_string(number)));
  } else {
    static_assert(has_no_state<T>, "fabric: nothing can be loaded into this type; see what `save` says");
  }
}

}  // namespace fabric::detail
