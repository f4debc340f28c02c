// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fabric/connector/environment.hpp"
#include "fabric/connector/flags.hpp"
#include "fabric/connector/host.hpp"
#include "fabric/connector/nearest.hpp"
#include "fabric/connector/selection.hpp"
#include "fabric/policy/registry.hpp"
#include "fabric/policy/rules.hpp"

namespace fabric::detail {

/// A view of an object that may not be there. It is no bare pointer because g++ 12 takes a comparison of a temporary's
/// address with null for no constant expression.
template <class T>
class Maybe {
 public:
  constexpr Maybe() = default;
  constexpr explicit Maybe(const T& object) : there_(true), object_(&object) {}

  constexpr explicit operator bool() const { return there_; }
  constexpr const T* operator->() const { return object_; }
  constexpr const T& operator*() const { return *object_; }

 private:
  bool there_ = false;
  const T* object_ = nullptr;
};

/// What the stages of `resolve` hand on. Large values are pointed to: the flags outlive the call.
struct State {
  const Flags& flags;
  const Variables& variables;
  const Host& host;
  const Registry& registry;
  Resolution& out;

  // After merging flags and variables. Texts are views of the flag or of the variable; an object has none.
  std::string_view accelerator{};
  Maybe<AcceleratorFacts> accelerator_object{};
  std::string_view strategy{};
  Maybe<StrategyObject> strategy_object{};
  const DevicesFlag* devices = nullptr;
  DevicesFlag devices_of_variable{};
  int num_nodes = 1;
  bool has_lt_variables = false;
  std::string_view precision{};  ///< A unified name such as "bf16-mixed".
  bool precision_given = false;

  // Texts are compared without regard to case; this is where the lower-case strategy lives.
  Name lowered{};

  Maybe<PrecisionObject> precision_object{};
  Maybe<EnvironmentObject> environment_object{};

  Stage stage = Stage::user;

  constexpr void refuse(const Problem& problem) {
    if (out.problems.empty()) out.stage = stage;
    out.problems.add(problem);
  }
  /// Notes of a run that is already refused would only distract.
  constexpr void note(Note what) {
    if (good()) out.notes.add(what);
  }
  [[nodiscard]] constexpr bool good() const { return out.problems.empty(); }

  [[nodiscard]] constexpr Combination combination() const {
    return {out.accelerator, out.strategy, out.precision, out.environment};
  }
  /// Does this rule of the table refuse what is chosen so far?
  [[nodiscard]] constexpr bool refused_by(RuleId id) const { return rule_of(id).refuses(combination()); }
};

/// A text in quotes, as messages show it: on one line.
constexpr Text<112> in_quotes(std::string_view text) {
  Text<112> result("'");
  for (const char& c : text.substr(0, 100)) {
    result.append(c == '\n' ? std::string_view("\\n") : std::string_view(&c, 1));
  }
  result.append("'");
  return result;
}

/// An object, as messages show it.
constexpr Text<112> in_angles(std::string_view name) {
  Text<112> result("<");
  result.append(name).append(">");
  return result;
}

/// The strategy as messages name it.
constexpr Text<112> shown_strategy(const State& state) {
  return state.strategy_object ? in_angles(state.strategy_object->facts.name) : in_quotes(state.strategy);
}

}  // namespace fabric::detail
