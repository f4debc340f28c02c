// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include <torch/types.h>

#include "fabric/comm/collectives.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/error.hpp"

namespace fabric::detail {

/// A line for `require_agreement`: "weight: Float [1, 2], trained".
[[nodiscard]] inline std::string described(const std::string& name, const at::Tensor& tensor) {
  std::ostringstream text;
  text << name << ": " << at::toString(tensor.scalar_type()) << ' ' << tensor.sizes()
       << (tensor.requires_grad() ? ", trained" : "");
  return text.str();
}

/// Throws fabric::Error, on all ranks, unless all of them give the same lines. The message shows the first line that
/// differs, as both sides have it. Costs one small collective where they agree.
inline void require_agreement(const World& world, const std::string& where, const std::vector<std::string>& lines) {
  if (!world.group || world.size < 2) return;
  std::string text;
  std::uint64_t hash = 14695981039346656037ULL;  // FNV-1a
  for (const std::string& line : lines) text += line + '\n';
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211ULL;

  const auto length = static_cast<std::int64_t>(text.size());
  const at::Tensor marks = all_gather(world, torch::tensor({static_cast<std::int64_t>(hash), length})).cpu();
  if ((marks == marks[0]).all().item<bool>()) return;

  text.resize(static_cast<std::size_t>(marks.select(1, 1).max().item<std::int64_t>()));
  const auto size = static_cast<std::int64_t>(text.size());
  const at::Tensor all = all_gather(world, at::from_blob(text.data(), {size}, at::kByte)).cpu().contiguous();
  const auto lines_of = [&](int rank) {
    const auto* begin = static_cast<const char*>(all[rank].data_ptr());
    std::vector<std::string> found;
    for (const char *at = begin, *end = begin + marks[rank][1].item<std::int64_t>(); at < end;) {
      const char* stop = std::find(at, end, '\n');
      found.emplace_back(at, stop);
      at = stop + 1;
    }
    return found;
  };
  const auto first = lines_of(0);
  for (int rank = 1; rank < world.size; ++rank) {
    const auto other = lines_of(rank);
    const auto [here, there] = std::mismatch(first.begin(), first.end(), other.begin(), other.end());
    if (here == first.end() && there == other.end()) continue;
    const auto shown = [](const auto& at, const auto& all_lines) {
      return at == all_lines.end() ? std::string("nothing more") : "'" + *at + "'";
    };
    throw Error("fabric: " + where + ": the ranks do not agree: rank 0 has " + shown(here, first) + ", rank " +
                std::to_string(rank) + " has " + shown(there, other));
  }
}

}  // namespace fabric::detail
