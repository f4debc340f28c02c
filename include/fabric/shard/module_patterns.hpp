// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "fabric/connector/nearest.hpp"

namespace fabric::detail {

/// Does the text match, where * stands for any letters?
[[nodiscard]] inline bool matches(std::string_view pattern, std::string_view text) {
  if (pattern.empty()) return text.empty();
  if (pattern[0] != '*') return !text.empty() && text[0] == pattern[0] && matches(pattern.substr(1), text.substr(1));
  return matches(pattern.substr(1), text) || (!text.empty() && matches(pattern, text.substr(1)));
}

/// "blocks.0.up" as its components; none for the module itself, whose name is empty.
[[nodiscard]] inline std::vector<std::string> components_of(std::string_view name) {
  std::vector<std::string> components;
  while (!name.empty()) {
    const std::size_t dot = name.find('.');
    components.emplace_back(name.substr(0, dot));
    name = dot == std::string_view::npos ? std::string_view() : name.substr(dot + 1);
  }
  return components;
}

/// Does a module's name match, component by component?
[[nodiscard]] inline bool matches_module(std::string_view pattern, std::string_view name) {
  const auto wanted = components_of(pattern);
  const auto given = components_of(name);
  if (wanted.size() != given.size()) return false;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    if (!matches(wanted[i], given[i])) return false;
  }
  return true;
}

/// Why a pattern matches none of the names: where it stops to match, what there is, and what may be meant.
[[nodiscard]] inline std::string why_no_match(std::string_view pattern, const std::vector<std::string>& names) {
  const auto wanted = components_of(pattern);
  std::size_t matched = 0;
  std::set<std::string> here;
  for (const std::string& name : names) {
    const auto given = components_of(name);
    std::size_t i = 0;
    while (i < wanted.size() && i < given.size() && matches(wanted[i], given[i])) ++i;
    if (i < matched) continue;
    if (i > matched) here.clear();
    matched = i;
    if (i < given.size()) here.insert(given[i]);
  }
  std::string place;
  for (std::size_t i = 0; i < matched; ++i) place += (i > 0 ? "." : "") + wanted[i];
  std::string text = place.empty() ? "the module" : "'" + place + "'";
  std::string all;
  for (const std::string& name : here) all += (all.empty() ? "" : ", ") + name;
  text += all.empty() ? " has no modules" : " has " + all;
  Nearest nearest(wanted[matched]);  // there is one: with all components matched, the name would be
  for (const std::string& name : here) nearest.consider(name);
  if (!nearest.best.empty()) text += ": did you mean '" + std::string(nearest.best) + "'?";
  return text;
}

}  // namespace fabric::detail
