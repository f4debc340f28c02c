// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fabric/checkpoint/kinds.hpp"
#include "fabric/checkpoint/load_plan.hpp"
#include "fabric/checkpoint/load_state.hpp"
#include "fabric/checkpoint/save_state.hpp"
#include "fabric/checkpoint/spread.hpp"
#include "fabric/checkpoint/value.hpp"

/// From the objects of a program to a `Value` and back.
namespace fabric {

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
    [[nodiscard]] Value save(Saving& saving, const std::string& key) const { return save_(saving, key); }
    void plan(const Value& value, const std::string& key, LoadPlan& plan) const { load_(value, key, plan); }

   private:
    template <class Object>
    void bind(std::shared_ptr<Object> object, bool read_only) {
      using Bare = std::remove_const_t<Object>;
      save_ = [object](Saving& saving, const std::string& key) { return detail::to_value<Bare>(*object, key, saving); };
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
    std::function<Value(Saving&, const std::string&)> save_;
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
