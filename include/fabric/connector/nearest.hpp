// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

#include "fabric/policy/text.hpp"

namespace fabric::detail {

constexpr char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }

/// How many insertions, deletions, replacements and swaps of neighbours lead from `a` to `b`, letter case aside
/// (optimal string alignment). Texts beyond 48 bytes are far from everything.
constexpr std::size_t edit_distance(std::string_view a, std::string_view b) {
  constexpr std::size_t longest = 48;
  if (a.size() > longest || b.size() > longest) return longest;
  std::array<std::array<std::size_t, longest + 1>, 3> rows{};
  for (std::size_t j = 0; j <= b.size(); ++j) rows[0][j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    auto& row = rows[i % 3];
    const auto& above = rows[(i + 2) % 3];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const bool same = lower(a[i - 1]) == lower(b[j - 1]);
      std::size_t least = above[j - 1] + (same ? 0 : 1);
      if (above[j] + 1 < least) least = above[j] + 1;
      if (row[j - 1] + 1 < least) least = row[j - 1] + 1;
      if (i > 1 && j > 1 && lower(a[i - 1]) == lower(b[j - 2]) && lower(a[i - 2]) == lower(b[j - 1])) {
        const std::size_t swapped = rows[(i + 1) % 3][j - 2] + 1;
        if (swapped < least) least = swapped;
      }
      row[j] = least;
    }
  }
  return rows[a.size() % 3][b.size()];
}

/// Collects the candidate nearest to a given text, if one is near enough to be meant.
struct Nearest {
  std::string_view given;
  std::string_view best{};
  std::size_t least = 0;

  constexpr explicit Nearest(std::string_view text) : given(text), least(text.size() / 3 + 2) {}
  constexpr void consider(std::string_view candidate) {
    // The difference in length is a lower bound.
    const std::size_t gap =
        candidate.size() > given.size() ? candidate.size() - given.size() : given.size() - candidate.size();
    if (gap >= least) return;
    const std::size_t distance = edit_distance(given, candidate);
    if (distance < least) {
      least = distance;
      best = candidate;
    }
  }
};

}  // namespace fabric::detail
