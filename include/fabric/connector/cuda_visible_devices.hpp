// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

#include "fabric/connector/host.hpp"
#include "fabric/connector/integer.hpp"
#include "fabric/connector/problem.hpp"

namespace fabric {

/// The GPUs that CUDA_VISIBLE_DEVICES leaves, as indices of the machine's GPUs in the order in which CUDA counts them.
struct VisibleGpus {
  std::array<int, 128> indices{};
  int count = 0;
  bool mig = false;  ///< The one device is a slice of a GPU; its index is -1 when the name does not tell which GPU's.

  constexpr bool push(int index) {
    if (count == static_cast<int>(indices.size())) return false;
    indices[static_cast<std::size_t>(count++)] = index;
    return true;
  }
  [[nodiscard]] constexpr bool has(int index) const {
    for (int i = 0; i < count; ++i) {
      if (indices[static_cast<std::size_t>(i)] == index) return true;
    }
    return false;
  }
};

namespace detail {

/// Reads the digits at the beginning like strtoul and ignores what follows; -1 when there are none or a minus.
constexpr int leading_number(std::string_view text) {
  text = trimmed(text);
  if (!text.empty() && text[0] == '+') text.remove_prefix(1);
  int value = -1;
  for (const char c : text) {
    if (c < '0' || c > '9') break;
    value = (value < 0 ? 0 : value) * 10 + (c - '0');
    if (value > 1'000'000) return 1'000'000;  // no machine has that many
  }
  return value;
}

/// The one GPU whose UUID begins so; -1 when there is none or more than one.
constexpr int gpu_of_uuid(std::string_view prefix, const std::string_view* uuids, int gpus) {
  int found = -1;
  for (int i = 0; i < gpus; ++i) {
    if (uuids[i].substr(0, prefix.size()) != prefix) continue;
    if (found >= 0) return -1;
    found = i;
  }
  return found;
}

constexpr bool starts_with(std::string_view text, std::string_view start) {
  return text.substr(0, start.size()) == start;
}

}  // namespace detail

/// The problem of naming more than one MIG device. CUDA shows a process only the first: a second rank would find no
/// device, or train on another rank's slice.
[[nodiscard]] constexpr Problem several_mig_devices(const Variables& variables) {
  std::string_view rest = variables.get("CUDA_VISIBLE_DEVICES");
  const std::string_view value = rest;
  int migs = 0;
  while (!rest.empty()) {
    const std::size_t comma = detail::find(rest, ',');
    if (detail::starts_with(trimmed(rest.substr(0, comma)), "MIG-")) ++migs;
    rest.remove_prefix(comma == std::string_view::npos ? rest.size() : comma + 1);
  }
  if (migs < 2) return {};
  Problem problem(Code::mig_several, "CUDA_VISIBLE_DEVICES");
  problem.names.append("'").append(value.substr(0, 80)).append("'");
  problem.detail.append("CUDA shows a process the first one only, so that a second rank would have none");
  return problem;
}

/// Which of `gpus` GPUs CUDA_VISIBLE_DEVICES leaves. Not set: all. Else the entries' order is kept, counting stops at
/// the first invalid one, a repeated one means that none is visible, and UUIDs may be shortened while they are unique
/// (CUDA C++ Programming Guide; torch.cuda for repeats). `uuids` has one entry for each GPU, or is null.
[[nodiscard]] constexpr Expected<VisibleGpus> visible_gpus(const Variables& variables, int gpus,
                                                           const std::string_view* uuids = nullptr) {
  VisibleGpus visible;
  const Found<Variable> variable = variables.find("CUDA_VISIBLE_DEVICES");
  if (!variable) {
    for (int i = 0; i < gpus; ++i) visible.push(i);
    return visible;
  }
  if (const Problem problem = several_mig_devices(variables); problem.code != Code::none) return problem;
  std::string_view rest = variable->value;
  const bool by_uuid = detail::starts_with(rest, "GPU-");
  while (true) {
    const std::size_t comma = detail::find(rest, ',');
    const std::string_view entry = rest.substr(0, comma);
    int index = -1;
    if (by_uuid) {
      if (detail::starts_with(entry, "GPU-") && uuids != nullptr) index = detail::gpu_of_uuid(entry, uuids, gpus);
    } else if (detail::starts_with(entry, "MIG-") && visible.count == 0) {
      // MIG-GPU-<uuid>/<instance>/<instance> names its GPU, MIG-<uuid> does not.
      const std::string_view gpu = entry.substr(4, detail::find(entry, '/') - 4);
      visible.mig = gpus > 0;
      if (visible.mig) visible.push(uuids != nullptr ? detail::gpu_of_uuid(gpu, uuids, gpus) : -1);
      return visible;
    } else {
      index = detail::leading_number(entry);
    }
    if (index < 0 || index >= gpus) return visible;
    if (visible.has(index)) return VisibleGpus{};
    visible.push(index);
    if (comma == std::string_view::npos) return visible;
    rest.remove_prefix(comma + 1);
  }
}

}  // namespace fabric
