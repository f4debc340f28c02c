// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <initializer_list>
#include <string_view>

#include "fabric/connector/host.hpp"
#include "fabric/connector/hostlist.hpp"
#include "fabric/connector/integer.hpp"
#include "fabric/connector/problem.hpp"

namespace fabric::detail {

/// The variables that one environment must find, in the order in which its problems name them.
template <std::size_t N>
using Required = std::string_view[N];

/// Adds "missing: A, B; not integers: C" over all of `names`, so that one problem says everything. MASTER_ADDR alone is
/// a text.
constexpr void list_faults(Problem& problem, const Variables& variables, const std::string_view* names,
                           std::size_t count) {
  bool any = false;
  for (std::size_t i = 0; i < count; ++i) {
    if (variables.has(names[i])) continue;
    problem.detail.append(any ? ", " : "missing: ").append(names[i]);
    any = true;
  }
  bool first = true;
  for (std::size_t i = 0; i < count; ++i) {
    const Found<Variable> v = variables.find(names[i]);
    if (!v || names[i] == "MASTER_ADDR" || parse_integer(v->value).valid) continue;
    problem.detail.append(!first ? ", " : any ? "; not integers: " : "not integers: ").append(names[i]);
    first = false;
  }
}

/// The problem of a variable whose value cannot be used; it shows the value.
constexpr Problem bad_value(Code code, std::string_view name, std::string_view value) {
  Problem problem(code, name);
  problem.names.append("'").append(value.substr(0, 80)).append("'");
  return problem;
}

/// A variable as an integer; `required` are all the variables that its environment needs.
template <std::size_t N>
constexpr Expected<int> read_int(const Variables& variables, std::string_view name, const Required<N>& required) {
  const Found<Variable> v = variables.find(name);
  if (v) {
    const Integer number = parse_integer(v->value);
    if (number.valid) return to_int(number.value);
  }
  Problem problem = !v ? Problem(Code::env_var_missing, name, name) : bad_value(Code::env_var_not_int, name, v->value);
  list_faults(problem, variables, required, N);
  return problem;
}

/// A variable as an integer, or `otherwise` when it is not set.
constexpr Expected<int> read_int_or(const Variables& variables, std::string_view name, int otherwise) {
  const Found<Variable> v = variables.find(name);
  if (!v) return otherwise;
  const Integer number = parse_integer(v->value);
  if (number.valid) return to_int(number.value);
  return bad_value(Code::env_var_not_int, name, v->value);
}

/// Two numbers of which the first must be below the second, when both are there.
constexpr bool below(const Variables& variables, std::string_view rank, std::string_view size) {
  const Integer r = parse_integer(variables.get(rank));
  const Integer s = parse_integer(variables.get(size));
  return !r.valid || !s.valid || r.value < s.value;
}

/// The variables' values contradict each other: names them all with their values.
constexpr Problem contradiction(const Variables& variables, std::initializer_list<std::string_view> names,
                                std::string_view rule) {
  Problem problem(Code::environment_half_set, *names.begin());
  for (const std::string_view name : names) {
    problem.names.append(problem.names.empty() ? "" : " and ").append(name);
    problem.names.append("=").append(variables.get(name).substr(0, 20));
  }
  problem.detail.append(rule);
  return problem;
}

}  // namespace fabric::detail
