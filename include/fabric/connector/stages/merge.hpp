// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fabric/connector/integer.hpp"
#include "fabric/connector/stages/state.hpp"

namespace fabric::detail {

/// Whether `LT_CLI_USED` says that the variables were made from the command line's flags; then a different value in
/// code is a conflict. Read only when it matters.
constexpr bool cli_was_used(State& state) {
  const Found<Variable> marker = state.variables.find("LT_CLI_USED");
  if (!marker) return false;
  const Integer number = parse_integer(marker->value);
  if (!number.valid) {
    Problem problem(Code::cli_flag_not_int, "LT_CLI_USED");
    problem.detail.append("given ").append(in_quotes(marker->value)).append("; legal: 0 or 1");
    state.refuse(problem);
    return false;
  }
  return number.value != 0;
}

/// A flag's value in code, as a text and as messages show it.
struct CodeValue {
  Text<112> text;
  Text<112> shown;
};

constexpr CodeValue text_value(std::string_view text) { return {text, in_quotes(text)}; }
constexpr CodeValue object_value(std::string_view name) { return {in_angles(name), in_angles(name)}; }
constexpr CodeValue number_value(long long number) {
  const auto text = Text<112>().append(number);
  return {text, text};
}

/// The variable that sets `flag`, if it is there and wins over `value`, which is asked for only then.
constexpr Found<Variable> winner(State& state, std::string_view variable, std::string_view flag,
                                 std::string_view otherwise, auto value) {
  if (!state.has_lt_variables) return {};
  const Found<Variable> v = state.variables.find(variable);
  if (!v) return v;
  const CodeValue code = value();
  if (v->value != code.text.view() && code.text != otherwise && cli_was_used(state)) {
    Problem problem(Code::cli_conflict, flag, flag);
    problem.name(code.shown).name(v->value);
    state.refuse(problem);
    return {};
  }
  return v;
}

constexpr void merge_accelerator(State& state) {
  const AcceleratorFlag& flag = state.flags.accelerator;
  if (flag.is_object) state.accelerator_object = Maybe(flag.facts);
  if (!flag.is_object) state.accelerator = flag.text;
  if (flag.is_object || flag.text != "auto") state.out.sources.accelerator = Source::flag;
  if (const auto v = winner(state, "LT_ACCELERATOR", "accelerator", "auto",
                            [&] { return flag.is_object ? object_value(flag.facts.name) : text_value(flag.text); })) {
    state.accelerator = v->value;
    state.accelerator_object = {};
    state.out.sources.accelerator = Source::variable;
  }
}

constexpr void merge_strategy(State& state) {
  const StrategyFlag& flag = state.flags.strategy;
  if (flag.is_object) state.strategy_object = Maybe(flag.object);
  if (!flag.is_object) state.strategy = flag.text;
  if (flag.is_object || flag.text != "auto") state.out.sources.strategy = Source::flag;
  if (const auto v = winner(state, "LT_STRATEGY", "strategy", "auto", [&] {
        return flag.is_object ? object_value(flag.object.facts.name) : text_value(flag.text);
      })) {
    state.strategy = v->value;
    state.strategy_object = {};
    state.out.sources.strategy = Source::variable;
  }
}

constexpr void merge_devices(State& state) {
  const DevicesFlag& flag = state.flags.devices;
  state.devices = &flag;
  if (!flag.automatic()) state.out.sources.devices = Source::flag;
  if (const auto v = winner(state, "LT_DEVICES", "devices", "auto", [&] {
        if (flag.form == DevicesFlag::Form::unset) return text_value("auto");
        if (flag.form == DevicesFlag::Form::text) return text_value(flag.text);
        return CodeValue{shown(flag), shown(flag)};
      })) {
    state.devices_of_variable = DevicesFlag(v->value);
    state.devices = &state.devices_of_variable;
    state.out.sources.devices = Source::variable;
  }
}

constexpr void merge_num_nodes(State& state) {
  const NumNodesFlag& flag = state.flags.num_nodes;
  state.num_nodes = flag.number;
  if (flag.is_text || flag.number != 1) state.out.sources.num_nodes = Source::flag;
  const auto v = winner(state, "LT_NUM_NODES", "num_nodes", "1",
                        [&] { return flag.is_text ? text_value(flag.text) : number_value(flag.number); });
  if (v) state.out.sources.num_nodes = Source::variable;
  if (!v && !flag.is_text) return;
  const std::string_view value = v ? v->value : flag.text.view();
  const Integer number = parse_integer(value);
  state.num_nodes = to_int(number.value);
  if (number.valid) return;
  Problem problem(Code::num_nodes_not_int, "num_nodes", in_quotes(value));
  problem.detail.append("a whole number above 0");
  state.refuse(problem);
  state.num_nodes = 1;
}

constexpr void merge_precision(State& state) {
  const PrecisionFlag& flag = state.flags.precision;
  using Form = PrecisionFlag::Form;
  const auto v = winner(state, "LT_PRECISION", "precision", "None", [&] {
    switch (flag.form) {
      case Form::text: return text_value(flag.text);
      case Form::integer: return number_value(flag.number);
      case Form::object: return object_value(flag.object.facts.name);
      case Form::unset: break;
    }
    return CodeValue{"None", "None"};
  });
  state.precision_given = bool(v) || flag.form == Form::text || flag.form == Form::integer;
  if (v) {
    state.out.sources.precision = Source::variable;
    state.precision = v->value;
    return;
  }
  if (flag.form != Form::unset) state.out.sources.precision = Source::flag;
  if (flag.form == Form::text) state.precision = flag.text;
  if (flag.form == Form::object) state.precision_object = Maybe(flag.object);
}

/// Stage env_args: each flag is merged with its `LT_` variable, in this order.
constexpr void merge_variables(State& state) {
  for (const Variable& v : state.variables) state.has_lt_variables |= v.name.substr(0, 3) == "LT_";
  merge_accelerator(state);
  merge_strategy(state);
  merge_devices(state);
  merge_num_nodes(state);
  merge_precision(state);
}

}  // namespace fabric::detail
