// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

#include "fabric/connector/problem.hpp"
#include "fabric/connector/selection.hpp"

namespace fabric {

/// A problem as a sentence for people: what is wrong, with which flag or variable, what was given, what is legal and what
/// is near.
[[nodiscard]] inline std::string message(const Problem& problem) {
  std::string text = "fabric: ";
  text.append(name_of(problem.code));
  if (!problem.flag.empty()) text.append(" (").append(problem.flag.view()).append(")");
  if (!problem.names.empty()) {
    text.append(": ");
    for (const char c : problem.names.view()) text.append(c == '\n' ? std::string_view(", ") : std::string_view(&c, 1));
  }
  if (!problem.detail.empty()) text.append("; ").append(problem.detail.view());
  if (!problem.nearest.empty()) text.append("; did you mean '").append(problem.nearest.view()).append("'?");
  return text;
}

/// All problems, one a line.
[[nodiscard]] inline std::string message(const Problems& problems) {
  std::string text;
  for (const Problem& problem : problems) text.append(text.empty() ? "" : "\n").append(message(problem));
  return text;
}

}  // namespace fabric
