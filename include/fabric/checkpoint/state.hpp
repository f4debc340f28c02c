// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <boost/hana/accessors.hpp>
#include <boost/hana/core/to.hpp>
#include <boost/hana/for_each.hpp>
#include <torch/torch.h>

#include "fabric/checkpoint/load_plan.hpp"
#include "fabric/checkpoint/module_state.hpp"
#include "fabric/checkpoint/optimizer_state.hpp"
#include "fabric/checkpoint/ranks.hpp"
#include "fabric/checkpoint/value.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/module/fabric_module.hpp"
#include "fabric/module/fabric_optimizer.hpp"
#include "fabric/tree.hpp"

/// From the objects of a program to a `Value` and back.
namespace fabric {

class State;

/// Has a state like Python's objects have.
template <class T>
concept HasStateDict = requires(const T& object, T& changed, const Value& state) {
  { object.state_dict() } -> std::convertible_to<Value>;
  changed.load_state_dict(state);
};

/// Has a state that differs by rank: `state_dict(ranks)` gathers it on rank 0, called on all ranks together, and
/// `load_state_dict(state, world, check_only)` takes this rank's part out of it; with `check_only` it changes nothing
/// and only throws what is wrong.
template <class T>
concept HasRankedState = requires(const T& object, T& changed, const Value& state, const World& world, Ranks& ranks) {
  { object.state_dict(ranks) } -> std::convertible_to<Value>;
  changed.load_state_dict(state, world, true);
};

namespace detail {

template <class T>
concept WrapsOptimizer = requires(const T& wrapper) {
  typename T::ModuleState;
  wrapper.optimizer();
};
template <class T>
concept WrapsModule = requires(const T& wrapper) {
  typename T::ModuleState;
  { wrapper.module() } -> ModuleImpl;
};
template <class T>
concept Scheduler = std::derived_from<T, torch::optim::LRScheduler>;

template <class T>
concept PlainText = std::same_as<T, std::string>;
template <class T>
concept PointerLike = !ModuleArgument<T> && !OptimizerArgument<T> && requires(const T& pointer) {
  *pointer;
  pointer.get();
};
template <class T>
inline constexpr bool is_reference_wrapper = false;
template <class T>
inline constexpr bool is_reference_wrapper<std::reference_wrapper<T>> = true;

template <class T>
concept MapLike = requires {
  typename T::key_type;
  typename T::mapped_type;
}
&&(std::same_as<typename T::key_type, std::string> || std::integral<typename T::key_type>);
template <class T>
concept ListLike = !MapLike<T> && !PlainText<T> && tree::Range<T> && requires {
  typename T::value_type;
};
template <class T>
concept GrowingList = ListLike<T> && requires(T& list, typename T::value_type value) {
  list.push_back(std::move(value));
};

/// Made of numbers, texts and tensors alone, so that it can be built from a checkpoint before anything changes.
template <class T>
constexpr bool is_data() {
  if constexpr (HasStateDict<T> || HasRankedState<T> || ModuleArgument<T> || OptimizerArgument<T> || WrapsModule<T> ||
                WrapsOptimizer<T> || PointerLike<T> || is_reference_wrapper<T>) {
    return false;
  } else if constexpr (MapLike<T>) {
    return is_data<typename T::mapped_type>();
  } else if constexpr (ListLike<T> || tree::OptionalLike<T>) {
    return is_data<typename T::value_type>();
  } else {
    return std::is_arithmetic_v<T> || std::is_enum_v<T> || PlainText<T> || std::same_as<T, at::Tensor> ||
           std::same_as<T, Value> || std::same_as<T, List> || std::same_as<T, Dict>;
  }
}

/// Dereferences what stands for a module or an optimizer.
template <class T>
auto& behind(T& object) {
  if constexpr (ModuleImpl<T> || OptimizerItself<T>) {
    return object;
  } else {
    return *object;
  }
}

template <class T>
inline constexpr bool has_no_state = false;

/// LibTorch's schedulers keep their count of steps to themselves and those that derive from them.
struct SchedulerAccess : torch::optim::LRScheduler {
  static unsigned& steps(torch::optim::LRScheduler& scheduler) { return scheduler.*(&SchedulerAccess::step_count_); }
  static std::vector<double> rates(const torch::optim::LRScheduler& scheduler) {
    return (scheduler.*(&SchedulerAccess::get_current_lrs))();
  }
};

// ---- Saving ----

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

// ---- Loading ----

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
      constexpr bool by_number = std::integral<typename T::key_type>;
      using SavedKey = std::conditional_t<by_number, std::int64_t, std::string>;
      const auto* saved = std::get_if<SavedKey>(&own);
      if (saved == nullptr) {
        plan.problem("'" + inner_key(key, to_text(own)) + "' has a key of another kind than here");
        good = false;
      } else {
        good =
            parse(inner, result[static_cast<typename T::key_type>(*saved)], inner_key(key, to_text(own)), plan) && good;
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
      object.load_state_dict(value, plan.world(), /*check_only=*/true);
      plan.change([&object, &world = plan.world(), state = DeepCopy().copy(value)] {
        object.load_state_dict(state, world, /*check_only=*/false);
      });
    } catch (const Error& error) {
      if (plan.strict()) {
        plan.problem("'" + key + "': " + error.what());
      } else {
        plan.missing(key);
      }
    }
  } else if constexpr (HasStateDict<T>) {
    plan.load([&object, state = DeepCopy().copy(value)] { object.load_state_dict(state); },
              [&object] {
                return [&object, before = DeepCopy().copy(object.state_dict())] { object.load_state_dict(before); };
              });
  } else if constexpr (WrapsModule<T>) {
    plan_load(object.module(), value, key, plan);
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
    if constexpr (HasStateDict<std::remove_cvref_t<decltype(optimizer)>>) {
      plan_load<std::remove_cvref_t<decltype(optimizer)>>(optimizer, value, key, plan);
    } else {
      plan_optimizer(optimizer, value, key, plan);
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
      if (parse(value, *fresh, key, plan)) plan.change([&object, fresh] { object = *fresh; });
    } else if (check_tensor(object, value, key, plan)) {
      plan.change(
          [target = object.detach(), source = std::get<at::Tensor>(value.data())]() mutable { target.copy_(source); });
    }
  } else if constexpr (is_data<T>()) {
    // A fixed number of items (std::array) is known only from the object.
    auto fresh = std::make_shared<T>();
    if (parse(value, *fresh, key, plan)) plan.change([&object, fresh] { object = std::move(*fresh); });
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
      if (const Value* saved = dict->find(saved_key)) {
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

}  // namespace detail

/// Names, and what they name: the objects of a program that a checkpoint holds. Objects given by reference must outlive
/// it; what is given by value (`{"version", 3}`) can be saved, and loaded only if it stands for an object elsewhere, as
/// the models and optimizers do that `setup` returns.
///
///     fabric.save("last.pt", {{"model", model}, {"optimizer", optimizer}, {"epoch", epoch}});
class State {
 public:
  class Entry {
   public:
    template <class T>
    Entry(std::string name, T&& object) : name_(std::move(name)) {  // NOLINT(bugprone-forwarding-reference-overload)
      using Object = std::remove_reference_t<T>;
      if constexpr (std::is_array_v<Object>) {
        bind(std::make_shared<std::string>(object), true);
      } else if constexpr (std::is_lvalue_reference_v<T>) {
        bind(std::shared_ptr<Object>(std::shared_ptr<void>(), &object), std::is_const_v<Object>);
      } else {
        using Stored = std::decay_t<T>;
        constexpr bool only_a_value = detail::is_data<Stored>() || std::is_pointer_v<Stored>;
        bind(std::make_shared<Stored>(std::forward<T>(object)), only_a_value);
      }
    }
    Entry(std::string name, std::initializer_list<Entry> nested);

    [[nodiscard]] const std::string& name() const { return name_; }
    [[nodiscard]] Value save(Ranks& ranks, const std::string& key) const { return save_(ranks, key); }
    void plan(const Value& value, const std::string& key, LoadPlan& plan) const { load_(value, key, plan); }

   private:
    template <class Object>
    void bind(std::shared_ptr<Object> object, bool read_only) {
      using Bare = std::remove_const_t<Object>;
      save_ = [object](Ranks& ranks, const std::string& key) { return detail::to_value<Bare>(*object, key, ranks); };
      if constexpr (std::is_const_v<Object> || std::is_pointer_v<Bare>) {
        load_ = refuse;
      } else {
        if (read_only) {
          load_ = refuse;
        } else {
          load_ = [object](const Value& value, const std::string& key, LoadPlan& plan) {
            detail::plan_load(*object, value, key, plan);
            plan.change([object] {});  // which lives until the plan has run
          };
        }
      }
    }
    static void refuse(const Value& /*value*/, const std::string& key, LoadPlan& plan) {
      plan.problem("'" + key + "' is a constant or a temporary here, so that nothing can be loaded into it");
    }

    std::string name_;
    std::function<Value(Ranks&, const std::string&)> save_;
    std::function<void(const Value&, const std::string&, LoadPlan&)> load_;
  };

  State() = default;
  State(std::initializer_list<Entry> entries) : entries_(entries) {}

  /// Adds one.
  void add(Entry entry) { entries_.push_back(std::move(entry)); }
  [[nodiscard]] const std::vector<Entry>& entries() const { return entries_; }

 private:
  std::vector<Entry> entries_;
};

inline State::Entry::Entry(std::string name, std::initializer_list<Entry> nested) : name_(std::move(name)) {
  bind(std::make_shared<State>(nested), false);
}

}  // namespace fabric
