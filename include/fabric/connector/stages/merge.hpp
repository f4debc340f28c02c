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

/// The variable that sets `flag`, if it wins. `text` is the code's value as a text, `shown` as messages show it.
constexpr Found<Variable> winner(State& state, std::string_view variable, std::string_view flag, std::string_view text,
                                 std::string_view shown, std::string_view otherwise) {
  const Found<Variable> v = state.variables.find(variable);
  if (!v) return v;
  if (v->value != text && text != otherwise && cli_was_used(state)) {
    Problem problem(Code::cli_conflict, flag, flag);
    problem.name(shown).name(v->value);
    state.refuse(problem);
    return {};
  }
  return v;
}

constexpr void merge_accelerator(State& state) {
  const AcceleratorFlag& flag = state.flags.accelerator;
  if (flag.is_object) {
    state.accelerator_object = Maybe(flag.facts);
    state.out.sources.accelerator = Source::flag;
  } else {
    state.accelerator = flag.text;
    if (flag.text != "auto") state.out.sources.accelerator = Source::flag;
  }
  const Text<112> shown = flag.is_object ? in_angles(flag.facts.name) : in_quotes(flag.text);
  const std::string_view text = flag.is_object ? shown.view() : flag.text.view();
  if (const auto v = winner(state, "LT_ACCELERATOR", "accelerator", text, shown, "auto")) {
    state.accelerator = v->value;
    state.accelerator_object = {};
    state.out.sources.accelerator = Source::variable;
  }
}

constexpr void merge_strategy(State& state) {
  const StrategyFlag& flag = state.flags.strategy;
  if (flag.is_object) {
    state.strategy_object = Maybe(flag.object);
    state.out.sources.strategy = Source::flag;
  } else {
    state.strategy = flag.text;
    if (flag.text != "auto") state.out.sources.strategy = Source::flag;
  }
  const Text<112> shown = flag.is_object ? in_angles(flag.object.facts.name) : in_quotes(flag.text);
  const std::string_view text = flag.is_object ? shown.view() : flag.text.view();
  if (const auto v = winner(state, "LT_STRATEGY", "strategy", text, shown, "auto")) {
    state.strategy = v->value;
    state.strategy_object = {};
    state.out.sources.strategy = Source::variable;
  }
}

constexpr void merge_devices(State& state) {
  const DevicesFlag& flag = state.flags.devices;
  state.devices = &flag;
  if (!flag.automatic()) state.out.sources.devices = Source::flag;
  if (!state.variables.has("LT_DEVICES")) return;
  const auto text = shown(flag);
  const bool is_text = flag.form == DevicesFlag::Form::text || flag.form == DevicesFlag::Form::unset;
  const std::string_view bare = is_text ? text.view().substr(1, text.length - 2U) : text.view();
  if (const auto v = winner(state, "LT_DEVICES", "devices", bare, text, "auto")) {
    state.devices_of_variable = DevicesFlag(v->value);
    state.devices = &state.devices_of_variable;
    state.out.sources.devices = Source::variable;
  }
}

constexpr void merge_num_nodes(State& state) {
  const NumNodesFlag& flag = state.flags.num_nodes;
  Name text = flag.text;
  if (!flag.is_text) text.append(static_cast<long long>(flag.number));
  state.num_nodes = flag.number;
  if (text != "1") state.out.sources.num_nodes = Source::flag;
  const Text<112> shown = flag.is_text ? in_quotes(flag.text) : Text<112>(text.view());
  const auto v = winner(state, "LT_NUM_NODES", "num_nodes", text, shown, "1");
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
  Name text;
  Text<112> shown("None");
  switch (flag.form) {
    case PrecisionFlag::Form::unset: text = "None"; break;
    case PrecisionFlag::Form::text:
      text = flag.text;
      shown = in_quotes(flag.text);
      break;
    case PrecisionFlag::Form::integer:
      text.append(static_cast<long long>(flag.number));
      shown = text.view();
      break;
    case PrecisionFlag::Form::object:
      text = flag.object.facts.name;
      shown = in_angles(text);
      break;
  }
  const auto v = winner(state, "LT_PRECISION", "precision", text, shown, "None");
  state.precision_given =
      bool(v) || flag.form == PrecisionFlag::Form::text || flag.form == PrecisionFlag::Form::integer;
  if (v) {
    state.out.sources.precision = Source::variable;
    state.precision = v->value;
  } else {
    if (flag.form != PrecisionFlag::Form::unset) state.out.sources.precision = Source::flag;
    if (flag.form == PrecisionFlag::Form::text) state.precision = flag.text;
    if (flag.form == PrecisionFlag::Form::object) state.precision_object = Maybe(flag.object);
  }
}

/// Stage env_args: each flag is merged with its `LT_` variable, in this order.
constexpr void merge_variables(State& state) {
  merge_accelerator(state);
  merge_strategy(state);
  merge_devices(state);
  merge_num_nodes(state);
  merge_precision(state);
}

}  // namespace fabric::detail
